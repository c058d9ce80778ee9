"""Computation graphs for deployment: encoder and predictor as ONNX models and as programs of torch.export.

| graph | inputs | outputs |
| --- | --- | --- |
| encoder | `images` [b, 3, size, size] | `patch_features` [b, n, d], `pooled` [b, d], and a linear head's `logits` |
| predictor | `features` [b, n, d], `action` [b, k] unless conditioning is `none` | `predicted` [b, n, d] |

The files are NAME.onnx and NAME.pt2. All values are float32, and b is any number from 1. Images are normalised as
config.json says. The encoder is timm's own VisionTransformer. The predictor predicts every patch of the whole image
(`Predictor.predict_image`). An ONNX model above LARGEST has its weights in a second file, NAME.onnx.data.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iwm.export.folder import ExportedModel, timm_state
from iwm.export.model import PretrainedModel
from iwm.models.attention import set_attention_impl
from iwm.models.encoder import timm_arguments
from iwm.models.predictor import Predictor
from shards.errors import UserError

GraphFormat = Literal["onnx", "torch-export"]
SUFFIXES: dict[GraphFormat, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
PACKAGES = ("onnx", "onnxscript")
"""Packages that torch needs to write ONNX."""
LARGEST = 1_900_000_000
"""Bytes of weights in one ONNX file, whose format ends at 2 GiB."""
EXAMPLES = 2
"""Images in the example batch. torch would take a batch of 1 as constant."""


class EncoderGraph(nn.Module):
    """timm's VisionTransformer, with the outputs of `PretrainedModel.features` and `pooled`, and a linear head's."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Float[Tensor, "b 3 s s"]) -> tuple[Tensor, ...]:
        features = self.vit.forward_features(images)
        pooled = features.mean(dim=1)
        return (features, pooled, self.vit.head(pooled)) if self.vit.num_classes else (features, pooled)


class PredictorGraph(nn.Module):
    """Predictor of the whole image under an action."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, features: Float[Tensor, "b n d"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b n d"]:
        return self.predictor.predict_image(features, action)


class UnconditionedPredictorGraph(nn.Module):
    """Predictor of a run with action.conditioning none, which takes no action."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        b = features.shape[0]  # len() would be the example's, a constant
        return self.predictor.predict_image(features, features.new_zeros(b, self.predictor.action_size))


@dataclass(frozen=True)
class DeployedGraph:
    """Module to export, with an example of its inputs by name and the names of its outputs."""

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]


def file_names(formats: Sequence[GraphFormat], with_predictor: bool) -> dict[str, str]:
    """Return the files that `write_graphs` writes, and what they contain."""
    kinds = {"onnx": "an ONNX model", "torch-export": "a program for `torch.export.load`"}
    parts = {"encoder": "encoder", **({"predictor": "predictor under an action"} if with_predictor else {})}
    return {
        f"{part}{SUFFIXES[kind]}": f"the {text}, as {kinds[kind]}" for part, text in parts.items() for kind in formats
    }


def check_formats(formats: Sequence[GraphFormat]) -> None:
    """Raise UserError where a package that a format needs is not installed."""
    missing = [package for package in PACKAGES if find_spec(package) is None] if "onnx" in formats else []
    if missing:
        raise UserError(f"--formats onnx: {' and '.join(missing)} not installed; run pip install 'iwm[onnx]'")


def write_graphs(exported: ExportedModel, model: PretrainedModel, formats: Sequence[GraphFormat], folder: Path) -> None:
    """Write encoder and predictor in each format. model: built from `exported`, on the CPU."""
    for name, graph in _graphs(exported, model).items():
        set_attention_impl(graph.module, fused=True)  # scaled_dot_product_attention, which every format knows
        for format in formats:
            write = _write_onnx if format == "onnx" else _write_program
            write(graph, folder / f"{name}{SUFFIXES[format]}")


def _graphs(exported: ExportedModel, model: PretrainedModel) -> dict[str, DeployedGraph]:
    config = exported.config
    state, classes = timm_state(exported)
    vit = VisionTransformer(**timm_arguments(config.encoder, config.views.size) | {"num_classes": len(classes)})
    vit.load_state_dict(state, strict=True)
    images = torch.zeros(EXAMPLES, 3, config.views.size, config.views.size)
    outputs = ("patch_features", "pooled", *(["logits"] if classes else []))
    graphs = {"encoder": DeployedGraph(EncoderGraph(vit).eval(), {"images": images}, outputs)}
    if model.predictor is not None:
        features = torch.zeros(EXAMPLES, config.grid_size**2, config.encoder.embed_dim)
        action = torch.zeros(EXAMPLES, model.action_spec.size)
        graphs["predictor"] = (
            DeployedGraph(
                PredictorGraph(model.predictor).eval(), {"features": features, "action": action}, ("predicted",)
            )
            if model.predictor.conditioned
            else DeployedGraph(
                UnconditionedPredictorGraph(model.predictor).eval(), {"features": features}, ("predicted",)
            )
        )
    return graphs


def _dynamic(graph: DeployedGraph) -> dict[str, dict[int, object]]:
    """Return the dynamic axes by input: the batch, which all share."""
    batch = torch.export.Dim("batch", min=1)
    return {name: {0: batch} for name in graph.inputs}


def _write_program(graph: DeployedGraph, path: Path) -> None:
    program = torch.export.export(graph.module, tuple(graph.inputs.values()), dynamic_shapes=_dynamic(graph))
    torch.export.save(program, path)


def _write_onnx(graph: DeployedGraph, path: Path) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of every operator that it leaves as it is
    size = sum(parameter.nbytes for parameter in graph.module.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # the inputs share the axis `batch`
        written = torch.onnx.export(
            graph.module,
            tuple(graph.inputs.values()),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=_dynamic(graph),
            dynamo=True,
            verbose=False,
        )
    assert written is not None  # None only without dynamo
    written.save(path, external_data=size > LARGEST)

"""Folder of a timm model (timm's local-dir, a clone of a repository of the Hugging Face Hub): weights and config.json.

config.json names the architecture, which determines what tensors do not: heads, activation, ε of the norms.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Attention, Block, Mlp, VisionTransformer
from torch import nn

from iwm.models.external.formats import ExternalCheckpointError

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights that timm writes and reads, the first preferred."""


@dataclass(frozen=True)
class TimmArchitecture:
    """Architecture of a timm ViT that this project's encoder can represent."""

    name: str
    num_heads: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Channel statistics of the pixels in [0, 1] that the model was trained on."""


def find_weights(folder: Path) -> Path | None:
    """Return the file of weights in a timm model's folder; None where there is none."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def read_architecture(weights: Path) -> TimmArchitecture | None:
    """Return the architecture that config.json beside the weights names; None without config.json.

    Raises ExternalCheckpointError where it is not timm's, or where the model computes something else than this
    project's encoder.
    """
    path = weights.with_name(CONFIG)
    if weights.name not in WEIGHTS or not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        name, arguments = content["architecture"], content.get("model_args", {})
        pixels = content.get("pretrained_cfg", content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExternalCheckpointError(
            f"{path} is not timm's, which names an architecture ({error!r}); delete it to use the recipe's heads"
        ) from error
    if not timm.is_model(name):
        raise ExternalCheckpointError(f"{path}: timm {timm.__version__} has no architecture {name}")
    vit = _create(path, name, arguments)
    statistics = {key: tuple(pixels.get(key) or vit.pretrained_cfg[key]) for key in ("mean", "std")}
    return TimmArchitecture(name, vit.blocks[0].attn.num_heads, **statistics)


def _create(path: Path, name: str, arguments: dict[str, Any]) -> VisionTransformer:
    """Create the model without memory. Raises ExternalCheckpointError where it is no ViT like this project's."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            vit = timm.create_model(name, pretrained=False, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExternalCheckpointError(f"{path}: timm could not create {name} ({error})") from error
    if not isinstance(vit, VisionTransformer):
        raise ExternalCheckpointError(f"{path}: {name} is a timm {type(vit).__name__}, not a VisionTransformer")
    others = list(dict.fromkeys(_differences(vit)))
    if others:
        raise ExternalCheckpointError(
            f"{path}: this project's encoder cannot represent {name}, which has {', '.join(others)}; choose a plain ViT"
        )
    return vit


def _differences(vit: VisionTransformer) -> Iterator[str]:
    """Yield the parts that this project's encoder has not, as far as tensors do not show them."""
    for part in vit.modules():
        if isinstance(part, nn.LayerNorm) and part.eps != 1e-6:
            yield f"LayerNorm with ε {part.eps:g}"
    for block in vit.blocks:
        if type(block) is not Block:
            yield f"blocks of class {type(block).__name__}"
        elif type(block.attn) is not Attention or type(block.mlp) is not Mlp:
            yield f"{type(block.attn).__name__} and {type(block.mlp).__name__} in its blocks"
        elif not isinstance(block.mlp.act, nn.GELU) or block.mlp.act.approximate != "none":
            yield f"activation {block.mlp.act}"

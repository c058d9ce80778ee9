"""Exported graphs: onnxruntime and torch.export compute what the model computes, for any batch size."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import iwm
from iwm.export import graphs
from iwm.export.__main__ import ExportOptions, export
from iwm.model_config import ActionConfig
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from shards.errors import UserError
from tests.export.test_export import CONFIG, make_run, pictures
from tests.export.test_timm_form import THREE_LAYERS, photo

CLOSE = {"atol": 1e-4, "rtol": 1e-3}


def normalised(images: Tensor) -> Tensor:
    return ((images / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 3, 1, 2)


def onnx(path: Path) -> Callable[..., Sequence[Tensor]]:
    """Return the function that an ONNX model computes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda *inputs: [
        torch.from_numpy(output)
        for output in session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    ]


def program(path: Path) -> Callable[..., Sequence[Tensor]]:
    """Return the function that a program of torch.export computes."""
    module = torch.export.load(path).module()

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        outputs = module(*inputs)
        return [outputs] if isinstance(outputs, Tensor) else outputs

    return run


@pytest.mark.parametrize(
    ("conditioning", "format"),
    [("none", "onnx"), ("none", "torch-export"), ("sequence", "torch-export"), ("feature", "onnx")],
)
def test_graphs_compute_what_the_model_does(
    tmp_path: Path, conditioning: Literal["none", "sequence", "feature"], format: graphs.GraphFormat
) -> None:
    run = make_run(tmp_path / "run", replace(CONFIG, action=ActionConfig(conditioning=conditioning)))
    export(ExportOptions(run, tmp_path / "model", formats=(format,)))
    model = iwm.load(tmp_path / "model")
    load, suffix = {"onnx": (onnx, "onnx"), "torch-export": (program, "pt2")}[format]
    encode, predict = (load(tmp_path / "model" / f"{name}.{suffix}") for name in ("encoder", "predictor"))
    for batch in (1, 2, 5):
        images, action = pictures(batch), torch.randn(batch, model.action_spec.size)
        patches, pooled = encode(normalised(images))
        torch.testing.assert_close(patches, model.features(images), **CLOSE)
        torch.testing.assert_close(pooled, model(images), **CLOSE)
        given = () if conditioning == "none" else (action,)
        (predicted,) = predict(model.features(images), *given)
        torch.testing.assert_close(predicted, model.predict(images, *given), **CLOSE)


def test_a_linear_heads_logits_are_the_third_output_and_a_finetuned_encoder_has_no_predictor(
    leverage: Callable[..., dict[str, Any]], run: Path, tmp_path: Path
) -> None:
    leverage("finetune-encoder")
    out = tmp_path / "model"
    export(ExportOptions(run, out, head=run / "eval" / "finetune-encoder", formats=("onnx",)))
    _, pooled, logits = onnx(out / "encoder.onnx")(normalised(pictures()))
    model = iwm.load(out)
    torch.testing.assert_close(pooled, model(pictures()), **CLOSE)
    torch.testing.assert_close(logits, model.classify(pictures()), **CLOSE)
    assert [path.name for path in out.glob("*.onnx")] == ["encoder.onnx"]
    assert "`encoder.onnx`" in (out / "README.md").read_text()
    assert "predictor.onnx" not in (out / "README.md").read_text()


def test_inputs_and_outputs_have_names_and_the_batch_is_dynamic(tmp_path: Path) -> None:
    export(ExportOptions(make_run(tmp_path / "run"), tmp_path / "model", formats=("onnx",)))
    shapes = {}
    for name in ("encoder", "predictor"):
        session = onnxruntime.InferenceSession(tmp_path / "model" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        shapes[name] = [{x.name: x.shape for x in part} for part in (session.get_inputs(), session.get_outputs())]
    assert shapes["encoder"] == [
        {"images": ["batch", 3, 32, 32]},
        {"patch_features": ["batch", 16, 48], "pooled": ["batch", 48]},
    ]
    assert shapes["predictor"] == [
        {"features": ["batch", 16, 48], "action": ["batch", 7]},
        {"predicted": ["batch", 16, 48]},
    ]
    entries = json.loads((tmp_path / "model" / "iwm.json").read_text())["action"]["entries"]
    assert len(entries) == 7


def test_weights_above_the_limit_of_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LARGEST", 1000)
    export(ExportOptions(make_run(tmp_path / "run"), tmp_path / "model", formats=("onnx",)))
    out = tmp_path / "model"
    assert (out / "encoder.onnx.data").stat().st_size > 200_000 > (out / "encoder.onnx").stat().st_size
    patches, _ = onnx(out / "encoder.onnx")(normalised(pictures()))
    np.testing.assert_allclose(patches, iwm.load(out).features(pictures()), atol=1e-4, rtol=1e-3)


def test_the_documentations_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(
        ExportOptions(
            make_run(tmp_path / "run", THREE_LAYERS), tmp_path / "exported" / "demo", formats=("onnx", "torch-export")
        )
    )
    photo(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "using-a-model.md").read_text()
    section = text[text.index("## In timm") : text.index("## The Hugging Face Hub")]
    names: dict[str, Any] = {}
    codes = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(codes) == 3
    for code in codes:
        exec(code, names)
    model = iwm.load("exported/demo")
    torch.testing.assert_close(names["patches"], names["encoder"](names["images"])[0])
    expected = model.predict(model.pixels("cat.jpg"))
    assert names["predicted"].shape == tuple(expected.shape)
    assert names["classifier"].num_classes == 10


def test_a_missing_package_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(UserError, match=r"onnxscript not installed; run pip install 'iwm\[onnx\]'"):
        export(ExportOptions(make_run(tmp_path / "run"), tmp_path / "model", formats=("onnx",)))
    assert not (tmp_path / "model").exists()

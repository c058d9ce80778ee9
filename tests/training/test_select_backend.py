"""Choice of the two-view pipeline's backend: by the model's device, and one line where it cannot be had."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from dali_pipelines.augmentations import ViewBackend
from dali_pipelines.views import Views
from iwm.config import ConfigError, PipelineBackend
from iwm.training import runtime
from iwm.training.runtime import select_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_default_is_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "HAS_TRITON", True)
    assert get_args(PipelineBackend) == ("auto", *get_args(ViewBackend))
    assert select_backend("auto", CPU, Views(), "data.backend") == "cpu"
    assert select_backend("auto", GPU, Views(), "data.backend") == "gpu"
    for name in get_args(ViewBackend):
        assert select_backend(name, GPU, Views(), "data.backend") == name


def test_a_backend_that_cannot_be_had_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpu", "triton"):
        with pytest.raises(ConfigError, match=rf"data\.backend {name}: it needs a GPU.* use data\.backend cpu"):
            select_backend(name, CPU, Views(), "data.backend")
    monkeypatch.setattr(runtime, "HAS_TRITON", False)
    with pytest.raises(ConfigError, match=r"data\.backend triton: torch came without Triton"):
        select_backend("triton", GPU, Views(), "data.backend")


def test_triton_refuses_views_with_an_op_that_its_kernels_lack_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "HAS_TRITON", True)
    monkeypatch.setattr("dali_pipelines.photometric_kernels.KERNEL_OPS", ("brightness", "contrast", "saturation"))
    with pytest.raises(ConfigError, match=r"data\.backend triton: its kernels lack hue, grayscale, blur, solarize"):
        select_backend("triton", GPU, Views(), "data.backend")
    simple = replace(Views().target, hue=0.0)
    assert select_backend("triton", GPU, Views(source=simple, target=simple), "data.backend") == "triton"

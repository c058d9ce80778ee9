"""The protocols' defaults are those of the paper (appendix A.2), which are repeated here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath

from dali_pipelines.augmentations import NO_PHOTOMETRIC, PhotometricConfig
from iwm.downstream import experiment
from iwm.downstream.progress import TrainPlan
from iwm.downstream.registry import PROTOCOLS
from iwm.downstream.settings import TrainSettings

LINEAR = {
    # "We train for 90 epochs … random crops with scale between 0.08 and 1 … horizontal flip with probability 0.5 …
    # batch size of 16,384 … LARS … learning rate of 6.4 with a warmup of 10 epochs … cosine … weight decay 0, momentum
    # 0.9".
    "lr": (6.4,),
    "pool": "mean",
    "batch_norm": False,
    "epochs": 90,
    "batch_size": 16_384,
    "warmup_epochs": 10,
    "weight_decay": 0,
    "momentum": 0.9,
    "encoder": ("teacher",),
    "crops.crop_scale": (0.08, 1.0),
    "crops.flip_probability": 0.5,
    "crops.photometric": NO_PHOTOMETRIC,
    "crops.rand_augment": None,
}
ATTENTIVE = {
    # "90 epochs … scale between 0.3 and 1 … flip with probability 0.5 … the same augmentations as used for the source
    # transformations besides masking … batch size of 1024 and AdamW, learning rate 1e-4 … cosine … weight decay 0.01"
    "epochs": 90,
    "batch_size": 1024,
    "warmup_epochs": 0,
    "lr": (1e-4,),
    "weight_decay": 0.01,
    "encoder": ("teacher",),
    "crops.crop_scale": (0.3, 1.0),
    "crops.flip_probability": 0.5,
    "crops.rand_augment": None,
    # A.1's source: jitter 0.8 of strengths 0.4, 0.4, 0.2, 0.1; blur 0.1 to 2, solarization and grayscale 0.2 each.
    "crops.photometric": PhotometricConfig(
        jitter_probability=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        grayscale_probability=0.2,
        blur_probability=0.2,
        blur_sigma=(0.1, 2.0),
        solarize_probability=0.2,
    ),
}
FINETUNING = {
    # "100 epochs … the same RandAugment strategy as MAE … 'rand-m9-mstd0.5-inc1' … random erasing with probability 0.25
    # … mixup 0.8, cutmix 1, label smoothing 0.1 … 5 epochs of warmup … cosine … batch size 1024 … drop path rate 0.2"
    "epochs": 100,
    "batch_size": 1024,
    "warmup_epochs": 5,
    "drop_path": 0.2,
    "mixup.random_erasing": 0.25,
    "mixup.mixup": 0.8,
    "mixup.cutmix": 1.0,
    "mixup.label_smoothing": 0.1,
    "crops.rand_augment": "rand-m9-mstd0.5-inc1",
    # MAE's: timm's defaults.
    "crops.crop_scale": (0.08, 1.0),
    "crops.flip_probability": 0.5,
    "crops.interpolation": "cubic",
    "crops.photometric": NO_PHOTOMETRIC,
}
PREDICTOR = FINETUNING | {
    # "on top of the teacher … the whole target image, with null transformation parameters … learning rate 1e-3 … weight
    # decay of 0.1, no layer wise lr decay … if the predictor is pretrained we divide its learning rate by 10"
    "lr": (1e-3,),
    "weight_decay": 0.1,
    "pretrained_lr_mult": 0.1,
}

PAPER: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "attentive": ATTENTIVE,
    # "learning rate of 2e-3 … weight decay of 0.005 … layer wise learning rate decay of 0.65"
    "finetune-encoder": FINETUNING | {"lr": (2e-3,), "weight_decay": 0.005, "layer_decay": 0.65},
    "finetune-predictor": PREDICTOR | {"encoder": ("teacher",), "actions": ("null",), "outputs": ("image",)},
    # "the encoder also gets his learning rate divided by 10 like the predictor … 0.9 layer decay across the combination
    # … learning rate 2e-3 and all other parameters are identical to predictor finetuning"
    "finetune-end-to-end": FINETUNING
    | {
        "lr": (2e-3,),
        "weight_decay": 0.1,
        "layer_decay": 0.9,
        "encoder_lr_mult": 0.1,
        "predictor_lr_mult": 0.1,
        "encoder": ("teacher",),
    },
    # "the same protocol as for predictor finetuning but train for the equivalent of 50 ImageNet epochs. The batch size
    # used is 512 for each task"
    "multitask": PREDICTOR | {"epochs": 50, "batch_size": 512, "encoder": ("teacher",), "predictors": ("pretrained",)},
    # "160k iterations … 1e-5, 2e-5 and 3e-5 … weight decay of 0.01 and a linear learning rate decay schedule"
    "segmentation": {"steps": 160_000, "lr": (1e-5, 2e-5, 3e-5), "weight_decay": 0.01, "warmup_epochs": 0},
}


def test_every_protocol_that_trains_is_held_to_the_paper() -> None:
    assert set(PAPER) == set(PROTOCOLS)


@pytest.mark.parametrize("name", PAPER)
def test_defaults_are_the_papers(name: str) -> None:
    settings: TrainSettings = PROTOCOLS[name].settings(checkpoint=Path("run"))
    settings.check()
    for field, expected in PAPER[name].items():
        value: Any = settings
        for part in field.split("."):
            value = getattr(value, part)
        assert value == expected, field


RISING = [pytest.approx(0.2 * block / 3) for block in range(1, 4)]
"""Rates of 4 blocks; the first block has rate 0 and no DropPath module."""


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # "a drop path rate of 0.2 through the encoder"
        ("finetune-encoder", {}, {"backbone": RISING}),
        # "a drop path rate of 0.2 through the predictor"
        ("finetune-predictor", {}, {"predictor_backbone": RISING}),
        ("finetune-end-to-end", {}, {"backbone": [], "predictor_backbone": RISING}),
        ("multitask", {"tasks": ("label", "side")}, {"predictor_backbone": RISING}),
    ],
)
def test_drop_path_rises_through_the_part_that_the_paper_names(
    monkeypatch: pytest.MonkeyPatch,
    leverage: Callable[..., Any],
    name: str,
    options: dict[str, Any],
    expected: dict[str, list[Any]],
) -> None:
    plans: list[TrainPlan] = []
    monkeypatch.setattr(experiment, "train", lambda plan, *rest: plans.append(plan))
    leverage(name, **options)
    for trial, optimizer in zip(plans[0].study.trials, plans[0].optimizers, strict=True):
        for part, rates in expected.items():
            drops = [module.drop_prob for module in getattr(trial, part).modules() if isinstance(module, DropPath)]
            # Each block has one after its attention and one after its MLP.
            assert drops[::2] == drops[1::2] == rates
        assert isinstance(optimizer, torch.optim.AdamW)
        assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)


def test_predictor_finetuning_trains_its_control_beside_it(leverage: Callable[..., Any]) -> None:
    assert PROTOCOLS["finetune-predictor"].settings(checkpoint=Path("run")).predictors is None
    result = leverage("finetune-predictor", steps=1)
    assert [trial["predictor"] for trial in result["trials"].values()] == ["pretrained", "random"]

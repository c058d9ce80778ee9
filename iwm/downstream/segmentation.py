"""Semantic segmentation (paper, A.2, table 6): UPerNet on the last four layers of encoder, predictor, or end to end.

Crops at the training resolution to learn from, whole images at their own size to be judged on. Several learning rates
are trained at once, as the paper picked the best of three.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from dali_pipelines.segmentation import MaskCrops
from iwm.config import Predictor as Shape
from iwm.downstream.bench import Bench, loading_of, where_left
from iwm.downstream.example import masked
from iwm.downstream.finetuning import Kind, predictor_of
from iwm.downstream.masks import Segmentation
from iwm.downstream.optim import adamw
from iwm.downstream.protocol import Made, run
from iwm.downstream.segmenters import Segmenter
from iwm.downstream.settings import (
    Training,
    crops_of,
    need,
    need_drop_path,
    need_each_once,
    need_rates,
    need_seeds,
)
from iwm.downstream.study import FrozenEncoders
from iwm.evaluation.bank import Context
from iwm.models.reader import Reader
from iwm.models.upernet import UPerNet
from iwm.training.signals import StopWish

Part = Literal["encoder", "predictor", "end-to-end"]


@dataclass(frozen=True)
class Settings(Training):
    """Segmentation by UPerNet: shards with masks (make_shards of ADE20k: docs/datasets.md)."""

    parts: tuple[Part, ...] = ("predictor",)
    """What is trained below the head: the encoder, the predictor on the frozen encoder, or both."""
    classes: int = 150
    """ADE20k's."""
    void_zero: bool = True
    """Whether mask id 0 is of no class, as in ADE20k, and classes are 1 to `classes`. Else classes begin with 0."""
    predictors: tuple[Kind, ...] | None = None
    """Predictors that are trained; default: `pretrained`, of encoders that have none `random`."""
    features: Context = "teacher"
    """Encoder: `teacher` (target encoder) or `student` (context encoder)."""
    lrs: tuple[float, ...] = (1e-5, 2e-5, 3e-5)
    """Highest learning rates, an arm each."""
    seeds: tuple[int, ...] = (0,)
    """Of what is not pretrained (heads, random predictors): each is trained, all from the same batches."""
    drop_path: float = 0.0
    """In what is trained below the head."""
    activation_checkpointing: bool = False
    """Keep only what enters each block that is trained, and run it again in the backward pass."""
    channels: int = 512
    """Inside of UPerNet."""
    crops: MaskCrops = field(default_factory=MaskCrops)
    """How training images are shown (`size` is the encoder's, `void` what --void-zero says)."""
    fresh: Shape = field(default_factory=lambda: Shape(width=384, depth=12))
    """The random predictor of an encoder that has none."""
    steps: int | None = 160_000
    epochs: float = 127.0
    """Only with --steps None. About as long as 160,000 steps of 16 images are on ADE20k."""
    validate_every: float = 12.7
    weight_decay: float = 0.01
    batch: int = 16

    def check(self) -> None:
        super().check()
        need(
            self.steps is None or self.epochs == Settings.epochs,
            f"--epochs {self.epochs:g}: the length is --steps {self.steps}; say --steps None too",
        )
        need_each_once("--parts", self.parts)
        if self.predictors is not None:
            need_each_once("--predictors", self.predictors)
        need(2 <= self.classes <= 255, f"--classes {self.classes}: from 2 to 255, which 8-bit masks can tell apart")
        need(self.channels >= 1, f"--channels {self.channels} must be positive")
        need_rates("--lrs", self.lrs)
        need_seeds(self.seeds)
        need_drop_path(self.drop_path)


def evaluate(bench: Bench, settings: Settings, wish: StopWish) -> dict[str, Any] | None:
    """Train and judge; None where `wish` ended it early. Raises ConfigError and ShardError."""
    pretrained, here = bench.pretrained, bench.here
    encoder = pretrained.encoder(settings.features)
    crops = replace(crops_of(settings.crops, pretrained), void=0 if settings.void_zero else 255)

    def opened(fitted: Bench) -> list[Segmentation]:
        def of_seed(seed: int, state: dict[str, Any] | None) -> Segmentation:
            return Segmentation(
                pretrained.shards,
                pretrained.train,
                pretrained.val,
                crops,
                classes=settings.classes,
                void_zero=settings.void_zero,
                patch=encoder.patch,
                batch_size=fitted.micro_batch,
                seed=seed,
                here=here,
                loading=loading_of(fitted),
                state=state,
            )

        return [where_left(fitted, 0, of_seed)]

    default: Kind = "pretrained" if pretrained.predictor is not None else "random"
    kinds: tuple[Kind, ...] = settings.predictors or (default,)
    checkpointing = settings.activation_checkpointing
    made = {}
    for part, lr, seed in product(settings.parts, settings.lrs, settings.seeds):
        for kind in (None,) if part == "encoder" else kinds:
            torch.manual_seed(seed)
            backbone = None
            if part != "predictor":
                backbone = encoder.trained(drop_path=settings.drop_path, checkpointing=checkpointing)
            reader = None
            if kind is not None:
                predictor = predictor_of(pretrained, kind, seed, settings.fresh)
                reader = Reader(predictor, drop_path=settings.drop_path, checkpointing=checkpointing, only_layers=True)
            width = encoder.width if reader is None else reader.inner_width
            torch.manual_seed(seed)
            head = UPerNet(width, settings.classes, channels=settings.channels)
            arm: nn.Module = Segmenter(
                head, encoder.patch, backbone=backbone, reader=reader, which=settings.features, prefix=encoder.prefix
            )
            if here.size > 1 and here.device.type == "cuda":
                arm = nn.SyncBatchNorm.convert_sync_batchnorm(arm)
            assert isinstance(arm, Segmenter)
            arm.to(here.device)
            facts = {"part": part, "lr": lr, "seed": seed, "features": settings.features, "predictor": kind}
            words = [part, *([kind] if kind and len(kinds) > 1 else []), f"lr {lr:g}"]
            words += [f"seed {seed}"] if len(settings.seeds) > 1 else []
            made[", ".join(words)] = Made(arm, adamw(arm, lr, settings.weight_decay), facts)
    frozen = FrozenEncoders({settings.features: encoder} if "predictor" in settings.parts else {})
    return run(
        bench,
        opened,
        made,
        frozen,
        wish,
        example=masked(pretrained, here.device),
        shape="linear",
        to_keep={"classes": settings.classes},
    )


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    several = "; * is the best on the held-out images" if len(result["arms"]) > 1 else ""
    made = Table(
        title="Segmentation: mIoU of the last step, whole images",
        caption=(
            f"{result['classes']} classes, {result['train_images']:,} training images, {result['steps']:,} steps of "
            f"{result['batch']}; {result['val_images']:,} held-out images{several}."
        ),
        box=SIMPLE_HEAD,
    )
    made.add_column("", no_wrap=True)
    for column in ("mIoU %", "pixels %", "best", "parameters"):
        made.add_column(column, justify="right", no_wrap=True)
    for name, arm in result["arms"].items():
        chosen = " *" if name == result["chosen"] and len(result["arms"]) > 1 else ""
        made.add_row(
            f"{name}{chosen}",
            f"{100 * arm['miou']['mean']:.1f}",
            f"{100 * arm['pixel_accuracy']['mean']:.1f}",
            f"{100 * arm['best']['score']:.1f} @ {arm['best']['epoch']:.3g}",
            f"{arm['parameters']:,}",
        )
    return made

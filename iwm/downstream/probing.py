"""What probes have in common: heads on frozen encoders, of several learning rates, from one forward pass of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dali_pipelines.crops import Crops
from iwm.downstream.arms import Probe
from iwm.downstream.bench import Bench, column_of
from iwm.downstream.classification import classes_of
from iwm.downstream.mixing import Mixing
from iwm.downstream.protocol import Made, run_labelled
from iwm.downstream.settings import Training, crops_of, need_each_once, need_rates
from iwm.downstream.study import FrozenEncoders
from iwm.evaluation.bank import Context
from iwm.training.signals import StopWish


@dataclass(frozen=True)
class Probing(Training):
    """Heads on frozen encoders; a probe for each encoder and learning rate."""

    features: tuple[Context, ...] = ("teacher",)
    """Encoders that are probed: `teacher` (target encoder), `student` (context encoder)."""
    lrs: tuple[float, ...] = ()
    """Highest learning rates, a probe each."""
    crops: Crops = field(default_factory=Crops)
    """How training images are shown (`size` is the encoder's)."""
    keep_features: bool = False
    """Compute features of centre crops once, and train on those: no augmentation, many times faster. They must fit
    into the device's memory: images × tokens × width × 2 bytes (4 in fp32); linear probes keep one token, the mean."""
    epochs: float = 90.0

    def check(self) -> None:
        super().check()
        need_rates("--lrs", self.lrs)
        need_each_once("--features", self.features)


def probe(
    bench: Bench,
    settings: Probing,
    wish: StopWish,
    *,
    head_of: Callable[[int], nn.Module],
    optimizer_of: Callable[[nn.Module, float], torch.optim.Optimizer],
    pooled: bool = False,
) -> dict[str, Any] | None:
    """Train and judge the probes; None where `wish` ended it early. Raises ConfigError and ShardError.

    head_of: so many classes; optimizer_of: a probe and its learning rate; pooled: heads are given the patches' mean.
    """
    pretrained = bench.pretrained
    shared = FrozenEncoders({which: pretrained.encoder(which) for which in settings.features}, pooled=pooled)
    column, crops = column_of(bench), crops_of(settings.crops, pretrained)
    names = classes_of(column, bench.here).names
    prefix = 0 if pooled else pretrained.teacher.prefix
    made = {}
    for which in settings.features:
        for lr in settings.lrs:
            torch.manual_seed(settings.seed)
            arm = Probe(head_of(len(names)), which, prefix).to(bench.here.device)
            facts = {"lr": lr, "seed": settings.seed, "features": which}
            made[f"{which}, lr {lr:g}"] = Made(arm, optimizer_of(arm, lr), facts)
    return run_labelled(bench, column, crops, Mixing.none(), names, made, shared, wish, cached=settings.keep_features)

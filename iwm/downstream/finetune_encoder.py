"""Encoder finetuning (paper, A.2, tables 4, S1 and S4): all of the encoder, a linear layer on average-pooled tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from iwm.downstream.arms import FinetunedEncoder
from iwm.downstream.bench import Bench, column_of
from iwm.downstream.classification import classes_of
from iwm.downstream.finetuning import Finetuning
from iwm.downstream.optim import adamw
from iwm.downstream.protocol import Made, run_labelled
from iwm.downstream.results import arms_table
from iwm.downstream.settings import crops_of, need_layer_decay
from iwm.downstream.study import FrozenEncoders
from iwm.evaluation.bank import Context
from iwm.models.heads import FINETUNING_STD, LinearHead
from iwm.models.layer_numbers import layer_scales
from iwm.training.signals import StopWish


@dataclass(frozen=True)
class Settings(Finetuning):
    """All of the encoder with a linear layer: AdamW, layer decay, drop path, RandAugment, mixup, cutmix, erasing."""

    features: Context = "teacher"
    """Encoder that is finetuned: `teacher` (target encoder) or `student` (context encoder)."""
    lr: float = 2e-3
    layer_decay: float = 0.65
    """Each layer's learning rate is so much of the one above."""
    weight_decay: float = 0.005

    def check(self) -> None:
        super().check()
        need_layer_decay(self.layer_decay)


def evaluate(bench: Bench, settings: Settings, wish: StopWish) -> dict[str, Any] | None:
    """Train and judge; None where `wish` ended it early. Raises ConfigError and ShardError."""
    pretrained, device = bench.pretrained, bench.here.device
    encoder = pretrained.encoder(settings.features)
    column, crops = column_of(bench), crops_of(settings.crops, pretrained)
    names = classes_of(column, bench.here).names
    made = {}
    for seed in settings.seeds:
        torch.manual_seed(seed)
        head = LinearHead(encoder.width, len(names), std=FINETUNING_STD)
        backbone = encoder.trained(drop_path=settings.drop_path, checkpointing=settings.activation_checkpointing)
        arm = FinetunedEncoder(backbone, head).to(device)
        scales = layer_scales(arm, settings.layer_decay)
        optimizer = adamw(arm, settings.lr, settings.weight_decay, scales.__getitem__)
        facts = {"lr": settings.lr, "seed": seed, "features": settings.features, "predictor": None}
        made[f"seed {seed}"] = Made(arm, optimizer, facts)
    return run_labelled(bench, column, crops, settings.mixing, names, made, FrozenEncoders({}), wish, timed=True)


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    return arms_table(result, "Encoder finetuning: accuracy of the last epoch ± standard error")

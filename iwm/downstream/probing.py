"""Linear and attentive probing: heads on frozen encoders (paper, A.2, tables 8, S2 and S5).

- Linear: a linear layer on average-pooled patches, the class token or both, trained with LARS as in MAE.
- Attentive: all tokens, class token and registers too, are pooled by cross-attention from one learned token as in the
  context autoencoder, trained with AdamW.

All probes (learning rates × encoders) share the encoders' forward pass of each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from iwm.downstream.context import RunContext, Runner, column_of
from iwm.downstream.experiment import TrialSpec, run_classification, trials_tables
from iwm.downstream.optim import adamw, lars
from iwm.downstream.protocol_settings import AttentiveProbeSettings, LinearProbeSettings, ProbeSettings
from iwm.downstream.settings import MixupSettings, sized_crops
from iwm.downstream.study import FrozenEncoders
from iwm.downstream.tasks import classes_of
from iwm.downstream.trials import Probe
from iwm.encoder_outputs import Pool
from iwm.models.heads import AttentiveHead, LinearHead
from iwm.training.runtime import StopFlag


def run_probe(
    context: RunContext,
    settings: ProbeSettings,
    stop: StopFlag,
    *,
    head_of: Callable[[int], nn.Module],
    optimizer_of: Callable[[nn.Module, float], torch.optim.Optimizer],
    pool: Pool | None = None,
    described: Mapping[str, Any] = {},
) -> dict[str, Any] | None:
    """Train and evaluate the probes. Return None where the stop flag ended it early.

    head_of: function from the number of classes to a head. optimizer_of: function from a probe and its learning rate to
    an optimiser. pool: heads receive one token; None: all tokens. described: further metadata of the probes. Raises
    ConfigError and ShardError.
    """
    pretrained = context.pretrained
    shared = FrozenEncoders({name: pretrained.encoder(name) for name in settings.encoder}, pool=pool)
    column, crops = column_of(context), sized_crops(settings.crops, pretrained.img_size)
    names = classes_of(column, context.dist).names
    specs = {}
    for features in settings.encoder:
        for lr in settings.lr:
            torch.manual_seed(settings.seed)
            trial = Probe(head_of(len(names)), features).to(context.dist.device)
            metadata = {"lr": lr, "seed": settings.seed, "features": features, **described}
            specs[f"{features}, lr {lr:g}"] = TrialSpec(trial, optimizer_of(trial, lr), metadata)
    return run_classification(
        context, column, crops, MixupSettings.none(), names, specs, shared, stop, cached=settings.cache_features
    )


def run_linear_probe(context: RunContext, settings: LinearProbeSettings, stop: StopFlag) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    width = context.pretrained.teacher.embed_dim * (2 if settings.pool == "both" else 1)
    return run_probe(
        context,
        settings,
        stop,
        head_of=lambda classes: LinearHead(width, classes, batch_norm=settings.batch_norm),
        optimizer_of=lambda trial, lr: lars(trial, lr, settings.weight_decay, settings.momentum),
        pool=settings.pool,
        described={"pool": settings.pool, "batch_norm": settings.batch_norm},
    )


def run_attentive_probe(context: RunContext, settings: AttentiveProbeSettings, stop: StopFlag) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    teacher = context.pretrained.teacher
    return run_probe(
        context,
        settings,
        stop,
        head_of=lambda classes: AttentiveHead(teacher.embed_dim, teacher.num_heads, classes),
        optimizer_of=lambda trial, lr: adamw(trial, lr, settings.weight_decay),
    )


LINEAR = Runner(run_linear_probe, trials_tables)
ATTENTIVE = Runner(run_attentive_probe, trials_tables)

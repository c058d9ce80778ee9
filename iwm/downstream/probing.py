"""Linear and attentive probing: heads on frozen encoders (paper, A.2, tables 8, S2 and S5).

- Linear: a linear layer on average-pooled tokens, trained with LARS as in MAE.
- Attentive: tokens are pooled by cross-attention from one learned token, trained with AdamW.

All probes (learning rates × encoders) share the encoders' forward pass of each batch. The best probe is chosen on the
held-out images, as the paper tuned every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import nn

from dali_pipelines.augmentations import PhotometricConfig
from dali_pipelines.pipelines import CropSettings
from iwm.downstream.context import Command, RunContext, column_of
from iwm.downstream.experiment import TrialSpec, run_classification, trials_tables
from iwm.downstream.mixup import MixupSettings
from iwm.downstream.optim import adamw, lars
from iwm.downstream.settings import LEARNING_RATE, TrainSettings, require_unique, sized_crops
from iwm.downstream.study import FrozenEncoders
from iwm.downstream.tasks import classes_of
from iwm.downstream.trials import Probe
from iwm.models.heads import AttentiveHead, LinearHead
from iwm.models.world_model import EncoderName
from iwm.ranges import Range
from iwm.training.runtime import StopFlag


@dataclass(frozen=True)
class ProbeSettings(TrainSettings):
    """Options of probing. There is one probe for each encoder and learning rate."""

    features: tuple[EncoderName, ...] = ("teacher",)
    """Encoders to probe: `teacher` (EMA target encoder), `student` (context encoder)."""
    lrs: Annotated[tuple[float, ...], LEARNING_RATE] = ()
    """Peak learning rates, one probe each."""
    crops: CropSettings = field(default_factory=CropSettings)
    """Crops and augmentations of training images; `size` is the encoder's image size."""
    cache_features: bool = False
    """Compute the features of centre crops once and train on them. Training is many times faster but has no
    augmentation. The features must fit into the device's memory: images × tokens × width × 2 bytes (4 in fp32). Linear
    probes store one token, the mean."""
    epochs: float = 90.0

    def check(self) -> None:
        super().check()
        require_unique("--lrs", self.lrs)
        require_unique("--features", self.features)


def run_probe(
    context: RunContext,
    settings: ProbeSettings,
    stop: StopFlag,
    *,
    head_of: Callable[[int], nn.Module],
    optimizer_of: Callable[[nn.Module, float], torch.optim.Optimizer],
    pooled: bool = False,
) -> dict[str, Any] | None:
    """Train and evaluate the probes. Return None where the stop flag ended it early.

    head_of: function from the number of classes to a head. optimizer_of: function from a probe and its learning rate to
    an optimiser. pooled: heads receive the mean of the patches. Raises ConfigError and ShardError.
    """
    pretrained = context.pretrained
    shared = FrozenEncoders({name: pretrained.encoder(name) for name in settings.features}, pooled=pooled)
    column, crops = column_of(context), sized_crops(settings.crops, pretrained.img_size)
    names = classes_of(column, context.dist).names
    prefix = 0 if pooled else pretrained.teacher.num_prefix_tokens
    specs = {}
    for features in settings.features:
        for lr in settings.lrs:
            torch.manual_seed(settings.seed)
            trial = Probe(head_of(len(names)), features, prefix).to(context.dist.device)
            metadata = {"lr": lr, "seed": settings.seed, "features": features}
            specs[f"{features}, lr {lr:g}"] = TrialSpec(trial, optimizer_of(trial, lr), metadata)
    return run_classification(
        context, column, crops, MixupSettings.none(), names, specs, shared, stop, cached=settings.cache_features
    )


@dataclass(frozen=True)
class LinearProbeSettings(ProbeSettings):
    """Train a linear layer on average-pooled tokens of the frozen encoder: LARS, crops from 8% of the image (A.2)."""

    lrs: tuple[float, ...] = (1.6, 3.2, 6.4, 12.8, 25.6)
    """Peak learning rates, one probe each; the paper's is 6.4 at its batch size."""
    momentum: Annotated[float, Range(min=0, below=1)] = 0.9
    """Momentum of LARS."""
    warmup_epochs: float = 10.0
    batch_size: int = 16_384
    micro_batch_size: int | None = 1024


def run_linear_probe(context: RunContext, settings: LinearProbeSettings, stop: StopFlag) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    return run_probe(
        context,
        settings,
        stop,
        head_of=lambda classes: LinearHead(context.pretrained.teacher.embed_dim, classes),
        optimizer_of=lambda trial, lr: lars(trial, lr, settings.weight_decay, settings.momentum),
        pooled=True,
    )


@dataclass(frozen=True)
class AttentiveProbeSettings(ProbeSettings):
    """Train a head that pools the frozen encoder's tokens by cross-attention from one learned token: AdamW (A.2)."""

    lrs: tuple[float, ...] = (1e-4,)
    """Peak learning rates, one probe each; the paper's is 1e-4 at its batch size."""
    crops: CropSettings = field(
        default_factory=lambda: CropSettings(crop_scale=(0.3, 1.0), photometric=PhotometricConfig())
    )
    """Crops and augmentations of training images; `size` is the encoder's image size. Default: crop scale and
    photometric augmentations of pretraining's source views (A.1)."""
    weight_decay: float = 0.01
    batch_size: int = 1024


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


LINEAR = Command(LinearProbeSettings, run_linear_probe, trials_tables)
ATTENTIVE = Command(AttentiveProbeSettings, run_attentive_probe, trials_tables)

"""What all finetuning has in common (paper, A.2): how images are shown, and which parts are made to be trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from dali_pipelines.crops import Crops
from iwm.config import ConfigError
from iwm.config import Predictor as Shape
from iwm.downstream.mixing import Mixing
from iwm.downstream.optim import adamw
from iwm.downstream.pretrained import Pretrained
from iwm.downstream.settings import Training, need_drop_path, need_rates, need_seeds, need_share
from iwm.models.foreign import MaeDecoder
from iwm.models.heads import FINETUNING_STD, AttentiveHead
from iwm.models.predictor import Predictor
from iwm.models.reader import Reader, fresh, fresh_decoder, fresh_for, kept

Kind = Literal["pretrained", "random"]
"""Parameters that a predictor begins with: the world model's, or those that its pretraining began with."""


def finetuning_crops() -> Crops:
    """MAE's: from 8% of the image, bicubic, RandAugment."""
    return Crops(interpolation="cubic", rand_augment="rand-m9-mstd0.5-inc1")


@dataclass(frozen=True)
class Finetuning(Training):
    """What the protocols that finetune have in common."""

    crops: Crops = field(default_factory=finetuning_crops)
    """How training images are shown (`size` is the encoder's)."""
    mixing: Mixing = field(default_factory=Mixing)
    """Random erasing, mixup, cutmix and label smoothing."""
    seeds: tuple[int, ...] = (0,)
    """Of what is not pretrained (heads, random predictors): each is trained, all from the same batches."""
    drop_path: float = 0.2
    activation_checkpointing: bool = False
    """Keep only what enters each block that is trained, and run it again in the backward pass."""
    lr: float = 1e-3
    epochs: float = 100.0
    warmup_epochs: float = 5.0
    batch: int = 1024
    fresh: Shape = field(default_factory=lambda: Shape(width=384, depth=12))
    """The random predictor of an encoder that has none (table S1)."""

    def check(self) -> None:
        super().check()
        self.mixing.check()
        need_seeds(self.seeds)
        need_rates("--lr", [self.lr])
        need_drop_path(self.drop_path)


@dataclass(frozen=True)
class PredictorFinetuning(Finetuning):
    """What the protocols that finetune predictors on a frozen encoder have in common."""

    pretrained_share: float = 0.1
    """Share of the learning rate that a pretrained predictor gets; a random one gets all of it, as heads and tokens."""
    weight_decay: float = 0.1
    keep_features: bool = False
    """Compute features of centre crops once, and train on those: no augmentation but label smoothing, many times
    faster. They must fit into the device's memory: images × tokens × width × 2 bytes."""

    def check(self) -> None:
        super().check()
        need_share("--pretrained-share", self.pretrained_share)

    def optimizer_of(self, arm: nn.Module, kind: Kind) -> torch.optim.Optimizer:
        """Of an arm on its device: a pretrained predictor at its share of the rate, all else at the whole of it."""
        share = self.pretrained_share if kind == "pretrained" else 1.0
        return adamw(
            arm, self.lr, self.weight_decay, lambda name: share if name.startswith("reader.predictor.") else 1.0
        )


def predictor_of(pretrained: Pretrained, kind: Kind, seed: int, shape: Shape) -> Predictor | MaeDecoder:
    """A predictor to be trained. Raises ConfigError where there is none to keep."""
    own = pretrained.predictor
    if kind == "pretrained":
        if own is None:
            raise ConfigError(
                f"--predictors pretrained: {pretrained.checkpoint} has no predictor; say --predictors random"
            )
        return kept(own)
    if isinstance(own, MaeDecoder):
        return fresh_decoder(own, seed)
    if pretrained.config is not None:
        return fresh(pretrained.config, seed)
    try:
        return fresh_for(pretrained.teacher, shape, seed)
    except ConfigError as error:
        raise ConfigError(f"--fresh: {error}") from error


def attentive_head(reader: Reader, pretrained: Pretrained, classes: int, seed: int) -> AttentiveHead:
    """An attentive head for a predictor's output, of the seed's parameters."""
    torch.manual_seed(seed)
    heads = pretrained.teacher.heads if reader.width == pretrained.teacher.width else reader.heads
    return AttentiveHead(reader.width, heads, classes, std=FINETUNING_STD)

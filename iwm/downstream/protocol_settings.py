"""Options of each downstream protocol; the defaults are the paper's (A.2).

This module imports neither torch nor DALI, so that a command can read its options before these are imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from dali_pipelines.augmentations import PhotometricConfig
from dali_pipelines.crops import CropSettings, SegmentationCrops
from iwm.downstream.settings import MixupSettings, TrainSettings, require, require_unique
from iwm.encoder_outputs import LayerNormKind, Pool
from iwm.model_config import PredictorConfig
from iwm.ranges import Range

LEARNING_RATE_SHARE = Range(min=0, below=math.inf)

PredictorInit = Literal["pretrained", "random"]
"""Initial parameters of a predictor: the pretrained ones, or random ones, initialised as for pretraining."""

Part = Literal["encoder", "predictor", "end-to-end"]


@dataclass(frozen=True)
class ProbeSettings(TrainSettings):
    """Options of probing. There is one probe for each encoder and learning rate."""

    crops: CropSettings = field(default_factory=CropSettings)
    """Crops and augmentations of training images; `size` is the encoder's image size."""
    cache_features: bool = False
    """Compute the features of centre crops once and train on them, many times faster, but without augmentation.
    The features must fit into the device's memory: images × tokens × width × 2 bytes (4 in fp32).
    Linear probes store one token, as --pool says."""
    epochs: float = 90.0


@dataclass(frozen=True)
class LinearProbeSettings(ProbeSettings):
    """Train a linear layer on average-pooled tokens of the frozen encoder: LARS, crops from 8% of the image (A.2)."""

    pool: Pool = "mean"
    """Input of the linear layer: `mean` of the patches, the class token `cls`, or `both`, of twice the width.
    `cls` and `both` need an encoder with a class token."""
    batch_norm: bool = False
    """Normalise the input by a batch norm without parameters, as MAE's linear probe does, whose rate A.2 has."""
    lr: tuple[float, ...] = (6.4,)
    momentum: Annotated[float, Range(min=0, below=1)] = 0.9
    """Momentum of LARS."""
    warmup_epochs: float = 10.0
    batch_size: int = 16_384
    micro_batch_size: int | None = 1024


@dataclass(frozen=True)
class AttentiveProbeSettings(ProbeSettings):
    """Train a head that pools the frozen encoder's tokens by cross-attention from one learned token: AdamW (A.2)."""

    lr: tuple[float, ...] = (1e-4,)
    crops: CropSettings = field(
        default_factory=lambda: CropSettings(crop_scale=(0.3, 1.0), photometric=PhotometricConfig())
    )
    """Crops and augmentations of training images; `size` is the encoder's image size.
    Default: crop scale and photometric augmentations of pretraining's source views (A.1)."""
    weight_decay: float = 0.01
    batch_size: int = 1024


def finetuning_crops() -> CropSettings:
    """Return MAE's crops: at least 8% of the image, bicubic, RandAugment."""
    return CropSettings(interpolation="cubic", rand_augment="rand-m9-mstd0.5-inc1")


@dataclass(frozen=True)
class FinetuneSettings(TrainSettings):
    """Options of all finetuning protocols."""

    crops: CropSettings = field(default_factory=finetuning_crops)
    """Crops and augmentations of training images; `size` is the encoder's image size."""
    mixup: MixupSettings = field(default_factory=MixupSettings)
    """Random erasing, mixup, cutmix and label smoothing."""
    seeds: Annotated[tuple[int, ...], Range(min=0)] = (0,)
    """Seeds of the parameters that are not pretrained (heads, random predictors).
    Each seed is a trial; all trials see the same batches."""
    drop_path: Annotated[float, Range(min=0, below=1)] = 0.2
    """Drop path rate of the last block; it grows linearly over the depth."""
    activation_checkpointing: bool = False
    """Store only the inputs of trained blocks, and recompute the blocks in the backward pass. This saves memory."""
    lr: tuple[float, ...] = (1e-3,)
    epochs: float = 100.0
    warmup_epochs: float = 5.0
    batch_size: int = 1024
    random_predictor: PredictorConfig = field(default_factory=lambda: PredictorConfig(embed_dim=384, depth=12))
    """Shape of the random predictor for an encoder without a predictor (table S1)."""

    def check(self) -> None:
        super().check()
        require_unique("--seeds", self.seeds)


@dataclass(frozen=True)
class FinetunedPredictorSettings(FinetuneSettings):
    """Options of the protocols that finetune predictors on a frozen encoder."""

    pretrained_lr_mult: Annotated[float, LEARNING_RATE_SHARE] = 0.1
    """Factor of the learning rate for a pretrained predictor. Random predictors, heads and tokens use the full rate."""
    weight_decay: float = 0.1
    cache_features: bool = False
    """Compute the features of centre crops once and train on them, many times faster.
    Label smoothing is then the only augmentation.
    The features must fit into the device's memory: images × tokens × width × 2 bytes (4 in fp32)."""


@dataclass(frozen=True)
class FinetuneEncoderSettings(FinetuneSettings):
    """Finetune the encoder with a linear layer: AdamW, layer decay, drop path, RandAugment, mixup, cutmix, erasing."""

    lr: tuple[float, ...] = (2e-3,)
    layer_decay: Annotated[float, Range(above=0, max=1)] = 0.65
    """Ratio of a layer's learning rate to that of the next layer."""
    weight_decay: float = 0.005


@dataclass(frozen=True)
class FinetunePredictorSettings(FinetunedPredictorSettings):
    """Finetune the predictor on the frozen encoder with an attentive head; a random predictor is the control."""

    predictors: tuple[PredictorInit, ...] | None = None
    """Predictors to finetune. Default: `pretrained` and `random`; only `random` for an encoder without a predictor."""
    actions: tuple[Literal["null", "random"], ...] = ("null",)
    """Actions in training: `null` (no change), or `random` (sampled as in pretraining).
    Held-out images always use the null action."""
    outputs: tuple[Literal["image", "token"], ...] = ("image",)
    """Output of the predictor: the whole target image, or one token without a position."""

    def check(self) -> None:
        super().check()
        for name in ("predictors", "actions", "outputs"):
            values = getattr(self, name)
            if values is not None:
                require_unique(f"--{name}", values)


@dataclass(frozen=True)
class FinetuneEndToEndSettings(FinetuneSettings):
    """Finetune encoder and predictor together: AdamW, one layer decay over both, a learning rate factor for each."""

    predictors: tuple[PredictorInit, ...] | None = None
    """Predictors to finetune. Default: `pretrained`; `random` for an encoder without a predictor."""
    lr: tuple[float, ...] = (2e-3,)
    encoder_lr_mult: Annotated[float, LEARNING_RATE_SHARE] = 0.1
    """Factor of the learning rate for the encoder."""
    predictor_lr_mult: Annotated[float, LEARNING_RATE_SHARE] = 0.1
    """Factor of the learning rate for a pretrained predictor. Random predictors and heads use the full rate."""
    layer_decay: Annotated[float, Range(above=0, max=1)] = 0.9
    """Ratio of a layer's learning rate to that of the next layer, over encoder and predictor together."""
    weight_decay: float = 0.1

    def check(self) -> None:
        super().check()
        if self.predictors is not None:
            require_unique("--predictors", self.predictors)


@dataclass(frozen=True)
class MultitaskSettings(FinetunedPredictorSettings):
    """Finetune one predictor for several tasks, with a token and a head per task, and single-task controls."""

    tasks: tuple[str, ...] = ()
    """Tasks: label columns of the run's shards (for example `colour`).
    FOLDER:COLUMN is a column of other shards with the same split names (for example data/inat18:label).
    An epoch is one pass over the first task's images."""
    predictors: tuple[PredictorInit, ...] = ("pretrained",)
    """Predictors to finetune."""
    controls: bool = True
    """Also train a predictor for each single task."""
    batch_size: int = 512
    """Images of each task per optimiser step, over all processes. A step has this number times the number of tasks."""
    epochs: float = 50.0

    def check(self) -> None:
        super().check()
        require_unique("--predictors", self.predictors)


@dataclass(frozen=True)
class SegmentationSettings(TrainSettings):
    """Train UPerNet for semantic segmentation on shards with masks (ADE20k: docs/datasets.md)."""

    parts: tuple[Part, ...] = ("predictor",)
    """Trained parts below the head: the encoder, the predictor on the frozen encoder, or both."""
    classes: Annotated[int, Range(min=2, max=255)] = 150
    """Number of classes (2 to 255, the range of 8-bit masks); default: ADE20k's."""
    reduce_zero_label: bool = True
    """Ignore pixels of mask id 0 and take ids 1 to `classes` as the classes, as in ADE20k.
    Otherwise ids 0 to `classes` - 1 are the classes, and 255 is ignored."""
    predictors: tuple[PredictorInit, ...] | None = None
    """Predictors to train. Default: `pretrained`; `random` for an encoder without a predictor."""
    lr: tuple[float, ...] = (1e-5, 2e-5, 3e-5)
    seeds: Annotated[tuple[int, ...], Range(min=0)] = (0,)
    """Seeds of the parameters that are not pretrained (heads, random predictors).
    Each seed is a trial; all trials see the same batches."""
    drop_path: Annotated[float, Range(min=0, below=1)] = 0.0
    """Drop path rate of the trained parts below the head."""
    activation_checkpointing: bool = False
    """Store only the inputs of trained blocks, and recompute the blocks in the backward pass. This saves memory."""
    channels: Annotated[int, Range(min=1)] = 512
    """Channels inside UPerNet. BEiT and mmsegmentation's configs/mae have 768 for ViT-B."""
    layer_norm: LayerNormKind = "shared"
    """Norms of the four layers that UPerNet receives.
    `shared`: the final norm of the encoder or predictor, on all layers. `last`: that norm on the last layer alone.
    `own`: a trained norm for each layer. `none`: layers as they are, as in BEiT and mmsegmentation's configs/mae."""
    crops: SegmentationCrops = field(default_factory=SegmentationCrops)
    """Crops and augmentations of training images.
    `size` is the encoder's image size; `ignore_index` follows from --reduce-zero-label."""
    random_predictor: PredictorConfig = field(default_factory=lambda: PredictorConfig(embed_dim=384, depth=12))
    """Shape of the random predictor for an encoder without a predictor."""
    steps: int | None = 160_000
    epochs: float = 127.0
    """Length of training (epochs), only with --steps None. Default: about 160,000 steps of 16 images on ADE20k."""
    validate_every: float = 12.7
    weight_decay: float = 0.01
    batch_size: int = 16

    def check(self) -> None:
        super().check()
        require(
            self.steps is None or self.epochs == SegmentationSettings.epochs,
            f"--epochs {self.epochs:g}: --steps {self.steps} sets the length; omit --epochs, or add --steps None",
        )
        require_unique("--parts", self.parts)
        if self.predictors is not None:
            require_unique("--predictors", self.predictors)
        require_unique("--seeds", self.seeds)

"""Finetuning of the encoder, of the predictor, and of both end to end (paper, 5.1, A.2, tables 3, 4, S1, S3, S4).

- Encoder: the whole encoder, with a linear layer on average-pooled tokens.
- Predictor: the predictor on a frozen encoder. With the null action it predicts the whole target, and an attentive head
  classifies the prediction. A predictor with random parameters is trained as a control. All trials share the frozen
  encoder's forward pass; --features, --actions and --outputs give every combination of table S3.
- End to end: encoder and predictor together, with an attentive head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Any, Literal

import torch
from torch import nn

from dali_pipelines.pipelines import CropSettings
from iwm.config import ConfigError, PredictorConfig
from iwm.downstream.context import Command, RunContext, column_of
from iwm.downstream.experiment import TrialSpec, run_classification, trials_tables
from iwm.downstream.mixup import MixupSettings
from iwm.downstream.optim import adamw, layer_decay_scales
from iwm.downstream.pretrained import Pretrained
from iwm.downstream.settings import (
    LEARNING_RATE,
    TrainSettings,
    require_unique,
    sized_crops,
)
from iwm.downstream.study import FrozenEncoders
from iwm.downstream.tasks import classes_of
from iwm.downstream.trials import FinetunedEncoder, FinetunedEncoderPredictor, FinetunedPredictor
from iwm.models.external.loading import MaeDecoder
from iwm.models.heads import FINETUNE_INIT_STD, AttentiveHead, LinearHead
from iwm.models.predictor import Predictor
from iwm.models.predictor_backbone import (
    PredictorBackbone,
    copy_pretrained,
    init_mae_decoder,
    init_predictor,
    init_predictor_for,
)
from iwm.models.world_model import EncoderName
from iwm.ranges import Range
from iwm.training.runtime import StopFlag

LEARNING_RATE_SHARE = Range(min=0, below=math.inf)

PredictorInit = Literal["pretrained", "random"]
"""Initial parameters of a predictor: the pretrained ones, or random ones, initialised as for pretraining."""


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
    """Seeds of the parameters that are not pretrained (heads, random predictors). Each seed is a trial; all trials see
    the same batches."""
    drop_path: Annotated[float, Range(min=0, below=1)] = 0.2
    """Drop path rate of the last block; it grows linearly over the depth."""
    activation_checkpointing: bool = False
    """Store only the inputs of trained blocks, and recompute the blocks in the backward pass. This saves memory."""
    lr: Annotated[float, LEARNING_RATE] = 1e-3
    """Peak learning rate."""
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
    """Compute the features of centre crops once and train on them. Training is many times faster, but label smoothing
    is the only augmentation. The features must fit into the device's memory: images × tokens × width × 2 bytes (4 in
    fp32)."""

    def optimizer_of(self, trial: nn.Module, kind: PredictorInit) -> torch.optim.Optimizer:
        """Return the optimiser of a trial on its device; a pretrained predictor has its own factor of the rate."""
        share = self.pretrained_lr_mult if kind == "pretrained" else 1.0
        return adamw(
            trial,
            self.lr,
            self.weight_decay,
            lambda name: share if name.startswith("predictor_backbone.predictor.") else 1.0,
        )


def predictor_of(
    pretrained: Pretrained, kind: PredictorInit, seed: int, shape: PredictorConfig
) -> Predictor | MaeDecoder:
    """Return a new predictor for a trial: a copy of the pretrained one, or one with random parameters.

    shape: of a random predictor where the encoder has none. Raises ConfigError where there is no pretrained predictor.
    """
    own = pretrained.predictor
    if kind == "pretrained":
        if own is None:
            raise ConfigError(
                f"--predictors pretrained: {pretrained.checkpoint} has no predictor; use --predictors random"
            )
        return copy_pretrained(own)
    if isinstance(own, MaeDecoder):
        return init_mae_decoder(own, seed)
    if pretrained.config is not None:
        return init_predictor(pretrained.config, seed)
    try:
        return init_predictor_for(pretrained.teacher, shape, seed)
    except ConfigError as error:
        raise ConfigError(f"--random-predictor: {error}") from error


def attentive_head(
    predictor_backbone: PredictorBackbone, pretrained: Pretrained, classes: int, seed: int
) -> AttentiveHead:
    """Return an attentive head for a predictor's output. seed: seed of its initial parameters."""
    torch.manual_seed(seed)
    heads = (
        pretrained.teacher.num_heads
        if predictor_backbone.embed_dim == pretrained.teacher.embed_dim
        else predictor_backbone.num_heads
    )
    return AttentiveHead(predictor_backbone.embed_dim, heads, classes, std=FINETUNE_INIT_STD)


@dataclass(frozen=True)
class FinetuneEncoderSettings(FinetuneSettings):
    """Finetune the encoder with a linear layer: AdamW, layer decay, drop path, RandAugment, mixup, cutmix, erasing."""

    features: EncoderName = "teacher"
    """Encoder to finetune: `teacher` (EMA target encoder) or `student` (context encoder)."""
    lr: float = 2e-3
    layer_decay: Annotated[float, Range(above=0, max=1)] = 0.65
    """Ratio of a layer's learning rate to that of the next layer."""
    weight_decay: float = 0.005


def run_finetune_encoder(
    context: RunContext, settings: FinetuneEncoderSettings, stop: StopFlag
) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    pretrained, device = context.pretrained, context.dist.device
    encoder = pretrained.encoder(settings.features)
    column, crops = column_of(context), sized_crops(settings.crops, pretrained.img_size)
    names = classes_of(column, context.dist).names
    specs = {}
    for seed in settings.seeds:
        torch.manual_seed(seed)
        head = LinearHead(encoder.embed_dim, len(names), std=FINETUNE_INIT_STD)
        backbone = encoder.finetune_copy(drop_path=settings.drop_path, checkpointing=settings.activation_checkpointing)
        trial = FinetunedEncoder(backbone, head).to(device)
        scales = layer_decay_scales(trial, settings.layer_decay)
        optimizer = adamw(trial, settings.lr, settings.weight_decay, scales.__getitem__)
        metadata = {"lr": settings.lr, "seed": seed, "features": settings.features, "predictor": None}
        specs[f"seed {seed}"] = TrialSpec(trial, optimizer, metadata)
    return run_classification(
        context, column, crops, settings.mixup, names, specs, FrozenEncoders({}), stop, timed=True
    )


TOKENS = {"image": "all", "token": "one"}
"""Names of the two outputs in a result (`tokens`)."""


@dataclass(frozen=True)
class FinetunePredictorSettings(FinetunedPredictorSettings):
    """Finetune the predictor on the frozen encoder with an attentive head; a random predictor is the control."""

    predictors: tuple[PredictorInit, ...] | None = None
    """Predictors to finetune. Default: `pretrained` and `random`; only `random` for an encoder without a predictor."""
    features: tuple[EncoderName, ...] = ("teacher",)
    """Frozen encoders that feed the predictors: `teacher` (EMA target encoder), `student` (context encoder)."""
    actions: tuple[Literal["null", "random"], ...] = ("null",)
    """Actions in training: `null` (no change), or `random` (sampled as in pretraining). Held-out images always use the
    null action."""
    outputs: tuple[Literal["image", "token"], ...] = ("image",)
    """Output of the predictor: the whole target image, or one token without a position."""

    def check(self) -> None:
        super().check()
        for name in ("predictors", "features", "actions", "outputs"):
            values = getattr(self, name)
            if values is not None:
                require_unique(f"--{name}", values)


def run_finetune_predictor(
    context: RunContext, settings: FinetunePredictorSettings, stop: StopFlag
) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    pretrained, device = context.pretrained, context.dist.device
    kinds = settings.predictors or (("pretrained", "random") if pretrained.predictor is not None else ("random",))
    shared = FrozenEncoders({name: pretrained.encoder(name) for name in settings.features})
    column, crops = column_of(context), sized_crops(settings.crops, pretrained.img_size)
    names = classes_of(column, context.dist).names
    specs = {}
    for kind, features, actions, output, seed in product(
        kinds, settings.features, settings.actions, settings.outputs, settings.seeds
    ):
        predictor = predictor_of(pretrained, kind, seed, settings.random_predictor)
        predictor_backbone = PredictorBackbone(
            predictor, output=output, drop_path=settings.drop_path, checkpointing=settings.activation_checkpointing
        )
        sampler = None
        if actions == "random":
            if not predictor_backbone.conditioned or pretrained.config is None or pretrained.spec is None:
                raise ConfigError("--actions random: this predictor takes no action; use --actions null")
            sampler = (pretrained.config.views, pretrained.spec)
        head = attentive_head(predictor_backbone, pretrained, len(names), seed)
        trial = FinetunedPredictor(
            predictor_backbone, head, features, pretrained.teacher.num_prefix_tokens, sampler
        ).to(device)
        optimizer = settings.optimizer_of(trial, kind)
        metadata = {
            "lr": settings.lr,
            "seed": seed,
            "features": features,
            "predictor": kind,
            "actions": actions,
            "tokens": TOKENS[output],
        }
        varied = [
            word
            for word, values in (
                (features, settings.features),
                (f"{actions} action", settings.actions),
                (output, settings.outputs),
            )
            if len(values) > 1
        ]
        specs[", ".join((kind, *varied, f"seed {seed}"))] = TrialSpec(trial, optimizer, metadata)
    return run_classification(
        context, column, crops, settings.mixup, names, specs, shared, stop, cached=settings.cache_features, timed=True
    )


@dataclass(frozen=True)
class FinetuneEndToEndSettings(FinetuneSettings):
    """Finetune encoder and predictor together: AdamW, one layer decay over both, a learning rate factor for each."""

    predictors: tuple[PredictorInit, ...] | None = None
    """Predictors to finetune. Default: `pretrained`; `random` for an encoder without a predictor."""
    features: EncoderName = "teacher"
    """Encoder to finetune: `teacher` (EMA target encoder) or `student` (context encoder)."""
    lr: float = 2e-3
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


def run_finetune_end_to_end(
    context: RunContext, settings: FinetuneEndToEndSettings, stop: StopFlag
) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    pretrained, device = context.pretrained, context.dist.device
    encoder = pretrained.encoder(settings.features)
    kinds = settings.predictors or (("pretrained",) if pretrained.predictor is not None else ("random",))
    column, crops = column_of(context), sized_crops(settings.crops, pretrained.img_size)
    names, checkpointing = classes_of(column, context.dist).names, settings.activation_checkpointing
    specs = {}
    for kind, seed in product(kinds, settings.seeds):
        predictor = predictor_of(pretrained, kind, seed, settings.random_predictor)
        predictor_backbone = PredictorBackbone(predictor, drop_path=settings.drop_path, checkpointing=checkpointing)
        head = attentive_head(predictor_backbone, pretrained, len(names), seed)
        trial = FinetunedEncoderPredictor(
            encoder.finetune_copy(checkpointing=checkpointing), predictor_backbone, head
        ).to(device)
        shares = {"backbone": settings.encoder_lr_mult, "head": 1.0}
        shares["predictor_backbone"] = settings.predictor_lr_mult if kind == "pretrained" else 1.0
        scales = {
            name: scale * shares[name.partition(".")[0]]
            for name, scale in layer_decay_scales(trial, settings.layer_decay).items()
        }
        metadata = {"lr": settings.lr, "seed": seed, "features": settings.features, "predictor": kind}
        specs[f"{kind}, seed {seed}"] = TrialSpec(
            trial, adamw(trial, settings.lr, settings.weight_decay, scales.__getitem__), metadata
        )
    return run_classification(
        context, column, crops, settings.mixup, names, specs, FrozenEncoders({}), stop, timed=True
    )


ENCODER = Command(FinetuneEncoderSettings, run_finetune_encoder, trials_tables)
PREDICTOR = Command(FinetunePredictorSettings, run_finetune_predictor, trials_tables)
END_TO_END = Command(FinetuneEndToEndSettings, run_finetune_end_to_end, trials_tables)

"""Finetuning of the encoder, of the predictor, and of both end to end (paper, 5.1, A.2, tables 3, 4, S1, S3, S4).

- Encoder: the whole encoder, with a linear layer on average-pooled tokens.
- Predictor: the predictor on a frozen encoder. With the null action it predicts the whole target, and an attentive head
  classifies the prediction. A predictor with random parameters is trained as a control. All trials share the frozen
  encoder's forward pass; --encoder, --actions and --outputs give every combination of table S3.
- End to end: encoder and predictor together, with an attentive head.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import nn

from iwm.config import ConfigError
from iwm.downstream.context import RunContext, Runner, column_of
from iwm.downstream.experiment import TrialSpec, run_classification, trials_tables, varied
from iwm.downstream.optim import adamw, layer_decay_scales
from iwm.downstream.pretrained import Pretrained
from iwm.downstream.protocol_settings import (
    FinetunedPredictorSettings,
    FinetuneEncoderSettings,
    FinetuneEndToEndSettings,
    FinetunePredictorSettings,
    PredictorInit,
)
from iwm.downstream.settings import sized_crops
from iwm.downstream.study import FrozenEncoders
from iwm.downstream.tasks import classes_of
from iwm.downstream.trials import FinetunedEncoder, FinetunedEncoderPredictor, FinetunedPredictor
from iwm.model_config import PredictorConfig
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
from iwm.models.predictor_shape import shape_of_predictor
from iwm.training.runtime import StopFlag


def optimizer_of(
    trial: nn.Module, settings: FinetunedPredictorSettings, kind: PredictorInit, lr: float
) -> torch.optim.Optimizer:
    """Return AdamW for a trial that is on its device; pretrained_lr_mult scales a pretrained predictor's rate."""
    share = settings.pretrained_lr_mult if kind == "pretrained" else 1.0
    return adamw(
        trial,
        lr,
        settings.weight_decay,
        lambda name: share if name.startswith("predictor_backbone.predictor.") else 1.0,
    )


def predictor_of(
    pretrained: Pretrained, kind: PredictorInit, seed: int, shape: PredictorConfig
) -> Predictor | MaeDecoder:
    """Return a new predictor for a trial: a copy of the pretrained one, or one with random parameters.

    shape: that of a random predictor, used only for an external encoder without a predictor. Raises ConfigError where
    `kind` is "pretrained" and there is no pretrained predictor, or `shape` is impossible.
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
    return init_predictor_for(pretrained.teacher, shape if own is None else shape_of_predictor(own), seed)


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


def run_finetune_encoder(
    context: RunContext, settings: FinetuneEncoderSettings, stop: StopFlag
) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    pretrained, device = context.pretrained, context.dist.device
    column, crops = column_of(context), sized_crops(settings.crops, pretrained.img_size)
    names = classes_of(column, context.dist).names
    specs = {}
    for features, lr, seed in product(settings.encoder, settings.lr, settings.seeds):
        encoder = pretrained.encoder(features)
        torch.manual_seed(seed)
        head = LinearHead(encoder.embed_dim, len(names), std=FINETUNE_INIT_STD)
        backbone = encoder.finetune_copy(
            drop_path=settings.drop_path, grad_checkpointing=settings.activation_checkpointing
        )
        trial = FinetunedEncoder(backbone, head).to(device)
        scales = layer_decay_scales(trial, settings.layer_decay)
        optimizer = adamw(trial, lr, settings.weight_decay, scales.__getitem__)
        metadata = {"lr": lr, "seed": seed, "features": features, "predictor": None}
        words = (*varied((features, settings.encoder), (f"lr {lr:g}", settings.lr)), f"seed {seed}")
        specs[", ".join(words)] = TrialSpec(trial, optimizer, metadata)
    return run_classification(
        context, column, crops, settings.mixup, names, specs, FrozenEncoders({}), stop, timed=True
    )


TOKENS = {"image": "all", "token": "one"}
"""Names of the two outputs in a result (`tokens`)."""


def run_finetune_predictor(
    context: RunContext, settings: FinetunePredictorSettings, stop: StopFlag
) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    pretrained, device = context.pretrained, context.dist.device
    kinds = settings.predictors or (("pretrained", "random") if pretrained.predictor is not None else ("random",))
    shared = FrozenEncoders({name: pretrained.encoder(name) for name in settings.encoder})
    column, crops = column_of(context), sized_crops(settings.crops, pretrained.img_size)
    names = classes_of(column, context.dist).names
    specs = {}
    for kind, features, actions, output, lr, seed in product(
        kinds, settings.encoder, settings.actions, settings.outputs, settings.lr, settings.seeds
    ):
        predictor = predictor_of(pretrained, kind, seed, settings.random_predictor)
        predictor_backbone = PredictorBackbone(
            predictor, output=output, drop_path=settings.drop_path, grad_checkpointing=settings.activation_checkpointing
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
        optimizer = optimizer_of(trial, settings, kind, lr)
        metadata = {
            "lr": lr,
            "seed": seed,
            "features": features,
            "predictor": kind,
            "actions": actions,
            "tokens": TOKENS[output],
        }
        words = varied(
            (features, settings.encoder),
            (f"{actions} action", settings.actions),
            (output, settings.outputs),
            (f"lr {lr:g}", settings.lr),
        )
        specs[", ".join((kind, *words, f"seed {seed}"))] = TrialSpec(trial, optimizer, metadata)
    return run_classification(
        context, column, crops, settings.mixup, names, specs, shared, stop, cached=settings.cache_features, timed=True
    )


def run_finetune_end_to_end(
    context: RunContext, settings: FinetuneEndToEndSettings, stop: StopFlag
) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    pretrained, device = context.pretrained, context.dist.device
    kinds = settings.predictors or (("pretrained",) if pretrained.predictor is not None else ("random",))
    column, crops = column_of(context), sized_crops(settings.crops, pretrained.img_size)
    names, recompute = classes_of(column, context.dist).names, settings.activation_checkpointing
    specs = {}
    for kind, features, lr, seed in product(kinds, settings.encoder, settings.lr, settings.seeds):
        encoder = pretrained.encoder(features)
        predictor = predictor_of(pretrained, kind, seed, settings.random_predictor)
        predictor_backbone = PredictorBackbone(predictor, drop_path=settings.drop_path, grad_checkpointing=recompute)
        head = attentive_head(predictor_backbone, pretrained, len(names), seed)
        trial = FinetunedEncoderPredictor(
            encoder.finetune_copy(grad_checkpointing=recompute), predictor_backbone, head
        ).to(device)
        shares = {"backbone": settings.encoder_lr_mult, "head": 1.0}
        shares["predictor_backbone"] = settings.predictor_lr_mult if kind == "pretrained" else 1.0
        scales = {
            name: scale * shares[name.partition(".")[0]]
            for name, scale in layer_decay_scales(trial, settings.layer_decay).items()
        }
        metadata = {"lr": lr, "seed": seed, "features": features, "predictor": kind}
        words = (kind, *varied((features, settings.encoder), (f"lr {lr:g}", settings.lr)), f"seed {seed}")
        specs[", ".join(words)] = TrialSpec(
            trial, adamw(trial, lr, settings.weight_decay, scales.__getitem__), metadata
        )
    return run_classification(
        context, column, crops, settings.mixup, names, specs, FrozenEncoders({}), stop, timed=True
    )


ENCODER = Runner(run_finetune_encoder, trials_tables)
PREDICTOR = Runner(run_finetune_predictor, trials_tables)
END_TO_END = Runner(run_finetune_end_to_end, trials_tables)

"""Pretrained models for downstream tasks: encoders and predictor of a run, or a published external encoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from iwm.actions import ActionSpec, action_spec
from iwm.config import Config, ConfigError
from iwm.downstream.settings import TrainSettings
from iwm.encoder_outputs import EncoderName
from iwm.models.attention import to_device
from iwm.models.backbone import Backbone, frozen_backbone
from iwm.models.external.loading import (
    WITH_PREDICTOR,
    ExternalCheckpointError,
    MaeDecoder,
    NoPredictorError,
    load_external,
)
from iwm.models.predictor import Predictor
from iwm.train_config import AttentionImpl
from iwm.training.checkpoint import CheckpointError, load_world_model, resolve, run_dir_of
from iwm.training.runtime import configure_cpu
from shards.cache import local_folder
from shards.hold_out import VAL


@dataclass(frozen=True)
class Pretrained:
    """Pretrained, frozen encoders on the device, their predictor, and the shards of labelled images."""

    kind: str
    """`iwm`, or the format of an external encoder."""
    run: Path
    """Folder whose eval/ contains the results."""
    checkpoint: Path
    """File that was loaded."""
    encoders: dict[EncoderName, Backbone]
    """`teacher` (EMA target encoder) and `student` (context encoder); an external encoder is a teacher."""
    predictor: Predictor | MaeDecoder | None
    """None for an external encoder other than MAE with its decoder and I-JEPA with its predictor."""
    config: Config | None
    """Configuration of the run; None for an external encoder."""
    shards: Path
    """Local folder; of a URL, that of its cache."""
    train: str
    """Training split."""
    val: str
    """Held-out split."""
    bf16: bool
    """Compute in bfloat16 autocast."""

    @property
    def teacher(self) -> Backbone:
        return self.encoders["teacher"]

    @property
    def attention(self) -> AttentionImpl:
        """Attention implementation, as in the run's training."""
        return self.config.train.attention_impl if self.config else "auto"

    @property
    def spec(self) -> ActionSpec | None:
        """Layout of the run's actions; None for an external encoder."""
        return action_spec(self.config.action, self.config.views) if self.config else None

    @property
    def img_size(self) -> int:
        """Side of an image in pixels."""
        return self.teacher.img_size

    @property
    def description(self) -> str:
        """Shape of the encoder and of its predictor as text."""
        t = self.teacher
        parts = [f"ViT {t.depth}×{t.embed_dim}, patch {t.patch_size}, {t.img_size} px"]
        if isinstance(self.predictor, Predictor):
            parts.append(f"predictor {len(self.predictor.blocks)}×{self.predictor.mask_token.numel()}")
        return ", ".join(parts)

    def encoder(self, which: EncoderName) -> Backbone:
        """Return an encoder. Raises ConfigError, naming the option, where there is none."""
        if which not in self.encoders:
            raise ConfigError(f"--encoder {which}: a {self.kind} encoder has no student; use --encoder teacher")
        return self.encoders[which]


def load_pretrained(settings: TrainSettings, device: torch.device) -> Pretrained:
    """Load the models of --checkpoint and --external. Raises ConfigError or CheckpointError, naming file and option."""
    return _load_external(settings, device) if settings.external.format else _load_run(settings, device)


def _load_run(settings: TrainSettings, device: torch.device) -> Pretrained:
    path = settings.checkpoint
    try:
        checkpoint = resolve(path)
        model, config = load_world_model(checkpoint, device)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; --checkpoint takes a run's folder, one of its checkpoints, or with --external.format the "
            "file of a published encoder"
        ) from error
    data = settings.data
    if device.type == "cpu" and not settings.num_threads:
        configure_cpu(config.train.num_threads)
    return Pretrained(
        kind="iwm",
        run=run_dir_of(checkpoint),
        checkpoint=checkpoint,
        encoders={"teacher": frozen_backbone(model.target_encoder), "student": frozen_backbone(model.encoder)},
        predictor=model.predictor,
        config=config,
        shards=local_folder(data.shards or config.data.shards, data.cache or config.data.cache, config.data.cache_gb),
        train=data.train or config.data.train,
        val=data.split or config.data.val or VAL,
        bf16=config.train.bf16_autocast if settings.precision == "auto" else settings.precision == "bf16",
    )


def _load_external(settings: TrainSettings, device: torch.device) -> Pretrained:
    path, external, data = settings.checkpoint, settings.external, settings.data
    assert external.format is not None  # checked by the caller
    if data.shards is None:
        raise ConfigError(f"--external.format {external.format}: the encoder has no data; use --data.shards FOLDER")
    if not path.suffix and settings.output is None:
        raise ConfigError(
            f"--checkpoint {path} has no suffix, so the folder of its results would have the same name; use --output"
        )
    load = partial(
        load_external,
        external.format,
        path,
        name=external.name,
        image_size=external.image_size,
        heads=external.heads,
        predictor_heads=external.predictor_heads,
    )
    try:
        try:
            encoder = load(predictor=external.format in WITH_PREDICTOR)
        except NoPredictorError:
            encoder = load()
    except ExternalCheckpointError as error:
        raise CheckpointError(f"--external.format {external.format}: {error}") from error
    to_device(encoder, device, "auto")
    backbone = frozen_backbone(encoder)
    if backbone.img_size % backbone.patch_size:
        raise ConfigError(
            f"--external.image-size {backbone.img_size} is not a multiple of the encoder's patch size, "
            f"{backbone.patch_size} px"
        )
    return Pretrained(
        kind=external.format,
        run=path.with_suffix(""),
        checkpoint=path,
        encoders={"teacher": backbone},
        predictor=encoder.predictor,
        config=None,
        shards=local_folder(data.shards, data.cache, None),
        train=data.train or "train",
        val=data.split or VAL,
        bf16=settings.precision != "fp32",
    )

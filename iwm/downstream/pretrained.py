"""What is leveraged: a run's encoders and world model, or an encoder that others published."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from iwm.actions import ActionSpec, action_spec
from iwm.config import AttentionKind, Config, ConfigError
from iwm.evaluation.bank import Context
from iwm.models.attention import settle
from iwm.models.backbone import Backbone, backbone_of
from iwm.models.foreign import ForeignError, MaeDecoder, NoDecoderError, load_foreign
from iwm.models.predictor import Predictor
from iwm.training.checkpoint import all_checkpoints, load_run, run_of
from iwm.training.whole_file import CheckpointError

if TYPE_CHECKING:
    from iwm.downstream.settings import Training


@dataclass(frozen=True)
class Pretrained:
    """Encoders as they were pretrained, frozen, on the device, and where labelled images are."""

    kind: str
    """`iwm`, or the kind of foreign encoder."""
    run: Path
    """The folder that results are written under, in eval/."""
    checkpoint: Path
    """The very file that was loaded."""
    encoders: dict[Context, Backbone]
    """teacher (target encoder) and student (context encoder); a foreign encoder is a teacher."""
    predictor: Predictor | MaeDecoder | None
    config: Config | None
    """The run's; None for a foreign encoder."""
    shards: Path
    train: str
    """Split that is learnt from."""
    val: str
    """Held-out split."""
    bf16: bool

    @property
    def teacher(self) -> Backbone:
        return self.encoders["teacher"]

    @property
    def attention(self) -> AttentionKind:
        """How attention is computed: as the run's training did."""
        return self.config.train.attention if self.config else "auto"

    @property
    def spec(self) -> ActionSpec | None:
        """Layout of the run's actions."""
        return action_spec(self.config.action, self.config.views) if self.config else None

    @property
    def size(self) -> int:
        """Side of an image in pixels."""
        return self.teacher.size

    @property
    def description(self) -> str:
        """The encoder's shape in words."""
        t = self.teacher
        parts = [f"ViT {t.depth}×{t.width}, patch {t.patch}, {t.size} px"]
        if isinstance(self.predictor, Predictor):
            parts.append(f"predictor {len(self.predictor.blocks)}×{self.predictor.mask_token.numel()}")
        return ", ".join(parts)

    def encoder(self, which: Context) -> Backbone:
        """Raises ConfigError where there is none, which names the option."""
        if which not in self.encoders:
            raise ConfigError(f"--features {which}: a {self.kind} encoder has no student; leave it at teacher")
        return self.encoders[which]


def load_pretrained(settings: Training, device: torch.device) -> Pretrained:
    """Load what --checkpoint and --foreign name. Raises ConfigError or CheckpointError, which name file and option."""
    return _load_foreign(settings, device) if settings.foreign.kind else _load_run(settings, device)


def _load_run(settings: Training, device: torch.device) -> Pretrained:
    path = settings.checkpoint
    checkpoint = (all_checkpoints(path) or [path])[0]
    try:
        model, config = load_run(checkpoint, device)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; --checkpoint takes a run's folder, one of its checkpoints, or with --foreign.kind a file that "
            "others published"
        ) from error
    data = settings.data
    val = data.split or config.data.val
    if val is None:
        raise ConfigError(f"{path}: the run has no validation split (data.val); say --data.split NAME")
    if device.type == "cpu" and not settings.threads and config.train.threads:
        torch.set_num_threads(config.train.threads)  # a small model is slower with more
    return Pretrained(
        kind="iwm",
        run=run_of(checkpoint),
        checkpoint=checkpoint,
        encoders={"teacher": backbone_of(model.target_encoder), "student": backbone_of(model.encoder)},
        predictor=model.predictor,
        config=config,
        shards=data.shards or config.data.shards,
        train=data.train or config.data.train,
        val=val,
        bf16=(config.train.precision if settings.precision == "auto" else settings.precision) == "bf16",
    )


def _load_foreign(settings: Training, device: torch.device) -> Pretrained:
    path, foreign, data = settings.checkpoint, settings.foreign, settings.data
    assert foreign.kind is not None  # the caller asked
    if data.shards is None:
        raise ConfigError(f"--foreign.kind {foreign.kind}: it has no data of its own; give --data.shards")
    if not path.suffix and settings.output is None:
        raise ConfigError(
            f"--checkpoint {path} has no ending to leave out in the name of its results' folder; say --output"
        )
    load = partial(load_foreign, foreign.kind, path, name=foreign.name, image_size=foreign.image_size)
    try:
        try:
            encoder = load(decoder=foreign.kind == "mae")
        except NoDecoderError:
            encoder = load()
    except ForeignError as error:
        raise CheckpointError(f"--foreign.kind {foreign.kind}: {error}") from error
    settle(encoder, device, "auto")
    backbone = backbone_of(encoder)
    if backbone.size % backbone.patch:
        raise ConfigError(
            f"--foreign.image-size {backbone.size} is no multiple of the encoder's patch of {backbone.patch} px"
        )
    return Pretrained(
        kind=foreign.kind,
        run=path.with_suffix(""),
        checkpoint=path,
        encoders={"teacher": backbone},
        predictor=encoder.decoder,
        config=None,
        shards=data.shards,
        train=data.train or "train",
        val=data.split or "val",
        bf16=settings.precision != "fp32",
    )

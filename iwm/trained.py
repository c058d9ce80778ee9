"""A trained model for those who only want to use one: `iwm.load(...)`, features of images, predictions of actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real, UInt8
from torch import Tensor, nn

from iwm.action_words import action_of
from iwm.actions import ActionSpec, action_spec
from iwm.config import Config, ConfigError
from iwm.downstream.head import BACKBONE, Head, build_arm
from iwm.downstream.segmenters import filled_up
from iwm.downstream.study import PIXELS, Arm, Shared
from iwm.exported import Exported, Origin, Which, is_exported, read_exported
from iwm.models.attention import settle
from iwm.models.backbone import Backbone
from iwm.models.encoder import Encoder
from iwm.models.predictor import Predictor
from iwm.models.upernet import enlarge
from iwm.training.checkpoint import CheckpointError, all_checkpoints, run_of
from iwm.training.checkpoint import load as load_checkpoint


class TrainedModel(nn.Module):
    """An encoder, the world model on top of it, and what a protocol trained on them, frozen and in evaluation mode.

    `encoder` and `predictor` are ordinary modules: `model.requires_grad_()` makes them trainable. There is no predictor
    where the encoder was finetuned, and nothing to classify by where no head was exported. Images are uint8
    [b, size, size, 3], or float [b, 3, size, size] from 0 to 1, which are rounded to the 256 levels of training; `size`
    is the run's. Everything runs where the parameters are; images and actions are brought there.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor | None,
        config: Config,
        which: Which,
        origin: Origin,
        head: Head | None = None,
    ) -> None:
        """head: what is to be built on top, of fresh parameters (`arm`)."""
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.head = head
        self.arm = build_arm(head, config, Backbone(encoder)) if head else None
        self.config = config
        self.action_spec: ActionSpec = action_spec(config.action, config.views)
        self.which: Which = which
        self.origin = origin
        self.requires_grad_(False).eval()

    @property
    def action_names(self) -> tuple[str, ...]:
        """Name of every entry of an action; none where the predictor is told nothing (action.conditioning none)."""
        return () if self.config.action.conditioning == "none" else self.action_spec.entries

    @property
    def device(self) -> torch.device:
        return self.encoder.pos_embed.device

    def features(self, images: Tensor) -> Float[Tensor, "b n d"]:
        """Features of every patch, row by row. Raises ConfigError for images of another size, shape or range."""
        encoded: Tensor = self.encoder(self._images(images))
        return encoded

    def pooled(self, images: Tensor) -> Float[Tensor, "b d"]:
        """One vector per image: the mean of its patches' features."""
        return self.features(images).mean(dim=1)

    def targets(self, images: Tensor) -> Float[Tensor, "b n d"]:
        """What predictions approximate: the features, layer-normed where the run's loss had them so.

        Predictions are of the target encoder's features; those of a context encoder only resemble them.
        """
        features = self.features(images)
        return F.layer_norm(features, features.shape[-1:]) if self.config.loss.target_norm else features

    def action(self, *, undo: Sequence[str] = (), apply: Sequence[str] = (), **changes: float) -> Float[Tensor, "k"]:
        """An action in words, from a source with no jitter: `action(brightness=+0.2, hue=0.05, undo=("grayscale",))`.

        Factors change by so much (a brightness of 1 becomes 1.2), hue in turns; no words: nothing changes. undo: what
        the source has and the target should not; apply: what the target should have (runs with a destructive target).
        Raises ConfigError for names and values that the run's training did not have.
        """
        return action_of(self.config, self.action_spec, changes, undo, apply).to(self.device)

    def predict(self, images: Tensor, action: Tensor | None = None) -> Float[Tensor, "b n d"]:
        """Predicted target features (see `targets`) of the images after an action.

        action: [k] for all images, or [b, k]; several actions with one image predict each from it. None: nothing
        changes, the only choice where action.conditioning is none. Raises ConfigError where it does not fit.
        """
        if self.predictor is None:
            raise ConfigError(
                "predict: this model's encoder was finetuned, and the world model does not fit it; export the run "
                "without --head for that"
            )
        context = self.features(images)
        actions = self._actions(action)
        b = max(len(context), len(actions))
        if len(context) not in (1, b) or len(actions) not in (1, b):
            raise ConfigError(f"predict: {len(actions)} actions for {len(context)} images; give one, or one for each")
        predicted: Tensor = self.predictor.transform(context.expand(b, -1, -1), actions.expand(b, -1))
        return predicted

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """What images can be asked for: the names of each task's classes, by number. Empty without a head."""
        return {name: task.classes for name, task in self.head.tasks.items()} if self.head else {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by number; of masks their ids. Raises ConfigError unless there is one task."""
        if len(self.tasks) > 1:
            raise ConfigError(f"classes: this model has several tasks; say model.tasks[{next(iter(self.tasks))!r}]")
        self._arm("classes")
        return next(iter(self.tasks.values()))

    def classify(self, images: Tensor, task: str | None = None) -> Float[Tensor, "b c"]:
        """Logits of every class (`classes`, or `tasks` of a model that has several, one of which is named).

        Raises ConfigError without a head for images, for a task that is none, and for images as `features` does.
        """
        arm = self._arm("classify", segments=False)
        names = list(self.tasks)
        if task is None and len(names) == 1:
            task = names[0]
        if task not in names:
            raise ConfigError(f"classify: say which task, as task={names[0]!r}; there are {', '.join(names)}")
        shared = self._shared(self._images(images))
        return arm.logits(shared, names.index(task)).float()

    def segment(self, images: Tensor) -> Float[Tensor, "b c h w"]:
        """Logits of every class for every pixel, of images of any one size; `.argmax(1)` are numbers in `classes`.

        Raises ConfigError without a head for pixels, and for images of another shape or range.
        """
        arm = self._arm("segment", segments=True)
        images = self._images(images, any_size=True)
        height, width = images.shape[1:3]
        filled = filled_up(images, self.config.encoder.patch)
        logits = arm.logits(self._shared(filled), 0).float()
        return enlarge(logits, filled.shape[1:3])[:, :, :height, :width]

    def _arm(self, asked: str, segments: bool | None = None) -> Arm:
        """What was trained, if it does what is asked for."""
        if self.arm is None or self.head is None:
            raise ConfigError(
                f"{asked}: this model has no head; train one and export it, as python tools/export.py RUN OUT "
                "--head RUN/eval/linear"
            )
        if segments is not None and self.head.segments != segments:
            able = "segment" if self.head.segments else "classify"
            raise ConfigError(f"{asked}: this model's head is of {self.head.protocol}; call {able}")
        return self.arm

    def _shared(self, images: Real[Tensor, "b h w 3"]) -> Shared:
        """What an arm is given: the images, and features where the encoder is not its own."""
        assert self.head is not None  # there is an arm
        return (
            {PIXELS: images} if self.predictor is None else {PIXELS: images, self.head.features: self.encoder(images)}
        )

    def _actions(self, action: Tensor | None) -> Float[Tensor, "b k"]:
        size = self.action_spec.size
        if action is None:
            return torch.zeros(1, size, device=self.device)
        if not self.action_names:
            raise ConfigError("predict: this model was trained with action.conditioning none; give no action")
        if action.ndim not in (1, 2) or action.shape[-1] != size or not action.is_floating_point():
            raise ConfigError(
                f"predict: an action is float [{size}] or [b, {size}] ({', '.join(self.action_names)}); "
                f"this one is {action.dtype} {list(action.shape)}; make it with model.action(...)"
            )
        return action.reshape(-1, size).to(self.device, torch.float32)

    def _images(self, images: Tensor, any_size: bool = False) -> UInt8[Tensor, "b h w 3"]:
        size = self.config.views.size
        channels, first = {torch.uint8: (3, 1), torch.float32: (1, 2)}.get(images.dtype, (0, 0))
        sides = tuple(images.shape[first : first + 2])
        whole = min(sides, default=0) > 0 if any_size else sides == (size, size)
        if channels == 0 or images.ndim != 4 or images.shape[channels] != 3 or not whole:
            wanted = "h, w" if any_size else f"{size}, {size}"
            raise ConfigError(
                f"images: {images.dtype} {list(images.shape)}; this model takes torch.uint8 [b, {wanted}, 3] or "
                f"torch.float32 [b, 3, {wanted}] from 0 to 1"
            )
        if images.dtype == torch.float32:
            if not bool(((images >= 0) & (images <= 1)).all()):
                raise ConfigError("images: float images go from 0 to 1, not normalised; these do not")
            images = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return images.to(self.device).contiguous()


def load_trained(path: Path | str, device: torch.device | str = "cpu", encoder: Which | None = None) -> TrainedModel:
    """Load a run's newest checkpoint, one checkpoint file, or a folder that tools/export.py wrote.

    encoder: which of the two; default: the target encoder, of an exported folder the one it has.

    Raises CheckpointError for what is missing, damaged or of another kind, ConfigError for a device that is not there.
    """
    path, device = Path(path), torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device}: this machine has no usable GPU; say device='cpu'")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is a part of an exported model: give its folder, {path.parent}")
    if is_exported(path):
        exported = read_exported(path)
        if encoder not in (None, exported.which):
            raise CheckpointError(f"{path} holds the {exported.which} encoder alone; export the {encoder} encoder too")
    else:
        exported = from_checkpoint(path, encoder or "target")
    return build_model(exported, path, device)


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint file that is meant: a run's newest one, or the file itself."""
    if not path.is_dir():
        return path
    found = all_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path} is neither a run's folder (no checkpoints/step-*.pt) nor an exported model's")
    return found[0]


def from_checkpoint(path: Path, which: Which) -> Exported:
    """What is exported of a checkpoint, or of a run's newest one. Raises CheckpointError as `load_trained` does."""
    file = newest_checkpoint(path)
    content = load_checkpoint(file)
    name = f"{run_of(file.resolve()).name}/{file.name}"
    encoder = "target_encoder." if which == "target" else "encoder."
    return Exported(
        config=content.config,
        which=which,
        origin=Origin(name, content.step, content.samples),
        encoder=_below(encoder, content.model),
        predictor=_below("predictor.", content.model),
    )


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def build_model(exported: Exported, path: Path, device: torch.device) -> TrainedModel:
    """The model of these tensors. Raises CheckpointError, naming `path`, where they do not fit their configuration."""
    config, head = exported.config, exported.head
    encoder = Encoder(config.encoder, config.views.size)
    predictor = Predictor(config, action_spec(config.action, config.views).size) if exported.predictor else None
    model = TrainedModel(encoder, predictor, config, exported.which, exported.origin, head)
    _fill(encoder, exported.encoder, "encoder", path)
    if predictor is not None and exported.predictor is not None:
        _fill(predictor, exported.predictor, "predictor", path)
    if model.arm is not None:
        finetuned = exported.encoder if head is not None and head.tunes_encoder else {}
        own = {f"{BACKBONE}{name}": tensor for name, tensor in finetuned.items()}
        _fill(model.arm, exported.trained | own, "head", path)
    settle(model, device, config.train.attention)
    return model


def _fill(part: nn.Module, tensors: Mapping[str, Tensor], name: str, path: Path) -> None:
    try:
        part.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise CheckpointError(f"{path}: its {name} does not fit its own configuration ({told})") from error

"""A trained model for those who only want to use one: `iwm.load(...)`, features of images, predictions of actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from iwm.action_words import action_of
from iwm.actions import ActionSpec, action_spec
from iwm.config import Config, ConfigError
from iwm.exported import Exported, Origin, Which, is_exported, read_exported
from iwm.models.attention import fuses, use_attention
from iwm.models.encoder import Encoder
from iwm.models.predictor import Predictor
from iwm.training.checkpoint import CheckpointError, all_checkpoints, run_of
from iwm.training.checkpoint import load as load_checkpoint


class TrainedModel(nn.Module):
    """An encoder and the world model on top of it, frozen and in evaluation mode.

    `encoder` and `predictor` are ordinary modules: `model.requires_grad_()` makes them trainable. Images are uint8
    [b, size, size, 3], or float [b, 3, size, size] from 0 to 1, which are rounded to the 256 levels of training; `size`
    is the run's. Everything runs where the parameters are; images and actions are brought there.
    """

    def __init__(self, encoder: Encoder, predictor: Predictor, config: Config, which: Which, origin: Origin) -> None:
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
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
        context = self.features(images)
        actions = self._actions(action)
        b = max(len(context), len(actions))
        if len(context) not in (1, b) or len(actions) not in (1, b):
            raise ConfigError(f"predict: {len(actions)} actions for {len(context)} images; give one, or one for each")
        predicted: Tensor = self.predictor.transform(context.expand(b, -1, -1), actions.expand(b, -1))
        return predicted

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

    def _images(self, images: Tensor) -> UInt8[Tensor, "b h w 3"]:
        size = self.config.views.size
        shapes = {torch.uint8: (size, size, 3), torch.float32: (3, size, size)}
        expected = shapes.get(images.dtype)
        if expected is None or images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ConfigError(
                f"images: {images.dtype} {list(images.shape)}; this model takes torch.uint8 [b, {size}, {size}, 3] or "
                f"torch.float32 [b, 3, {size}, {size}] from 0 to 1"
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
        exported = _from_checkpoint(path, encoder or "target")
    return _build(exported, path, device)


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint file that is meant: a run's newest one, or the file itself."""
    if not path.is_dir():
        return path
    found = all_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path} is neither a run's folder (no checkpoints/step-*.pt) nor an exported model's")
    return found[0]


def _from_checkpoint(path: Path, which: Which) -> Exported:
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


def _build(exported: Exported, path: Path, device: torch.device) -> TrainedModel:
    config = exported.config
    encoder = Encoder(config.encoder, config.views.size)
    predictor = Predictor(config, action_spec(config.action, config.views).size)
    for part, state, name in ((encoder, exported.encoder, "encoder"), (predictor, exported.predictor, "predictor")):
        try:
            part.load_state_dict(state, strict=True)
        except RuntimeError as error:
            told = " ".join(str(error).split())
            raise CheckpointError(f"{path}: its {name} does not fit its own configuration ({told})") from error
    model = TrainedModel(encoder, predictor, config, exported.which, exported.origin).to(device)
    use_attention(model.to(memory_format=torch.channels_last), fuses(config.train.attention, device))
    return model

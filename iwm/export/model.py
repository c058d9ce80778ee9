"""Pretrained model for inference: features of images, predictions under actions, classification, segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Real, UInt8
from torch import Tensor, nn

from iwm.action_space import action_space
from iwm.actions import ActionSpec, action_spec, describe_action, make_action
from iwm.config import Config, ConfigError
from iwm.downstream.progress import TrainedHead
from iwm.downstream.registry import lookup
from iwm.downstream.study import PIXELS, SharedInputs, Trial
from iwm.downstream.trials import pad_to_patches
from iwm.encoder_outputs import EncoderName
from iwm.export.folder import Provenance
from iwm.export.images import Images, to_pixels
from iwm.models.action_energy import ActionEnergy
from iwm.models.action_search import search_by_gradient
from iwm.models.backbone import Backbone
from iwm.models.encoder import Encoder
from iwm.models.heads import upsample
from iwm.models.predictor import Predictor
from iwm.models.world_model import normalize_targets
from iwm.search_settings import GradientSettings


class InferredAction(NamedTuple):
    """Actions that lead from sources to targets, as far as the model can tell."""

    action: Float[Tensor, "b k"]
    """Nearest actions that the search found, as `predict` takes them."""
    distance: Float[Tensor, " b"]
    """Euclidean distance between the prediction under the action and the target's features, over all tokens."""
    words: list[str]
    """Actions in words: 'brightness +0.30, hue -18°, undo grayscale'."""


class PretrainedModel(nn.Module):
    """Encoder, predictor and an optional trained head, frozen and in evaluation mode.

    `encoder` and `predictor` are ordinary modules: `model.requires_grad_()` makes them trainable. `predictor` is None
    where the encoder was finetuned, and `head` is None where no head was exported.

    Images are what `pixels` takes: a path, a PIL image, a numpy array, a torch tensor, a batch, or a list. One image is
    a batch of one: b = 1. Images and actions are moved to the device of the parameters. All methods raise ConfigError
    for what is no image, cannot be read, or could mean two things.
    """

    resize: bool = True
    """True: images of any size are resized and cropped to the run's. False: other sizes are refused."""

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor | None,
        config: Config,
        which: EncoderName,
        origin: Provenance,
        head: TrainedHead | None = None,
    ) -> None:
        """Set the parts. head: description of a head; its trial is built with new parameters."""
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.head = head
        self.trial = lookup(head.protocol).build_trial(head, config, Backbone(encoder)) if head else None
        self.config = config
        self.action_spec: ActionSpec = action_spec(config.action, config.views)
        self.encoder_name: EncoderName = which
        self.origin = origin
        self.requires_grad_(False).eval()

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the entries of an action; empty where the predictor takes no action (action.conditioning none)."""
        return () if self.config.action.conditioning == "none" else self.action_spec.names

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.encoder.pos_embed.device

    def pixels(self, images: Images) -> UInt8[Tensor, "b size size 3"]:
        """Return the pixels that the encoder sees, RGB from 0 to 255, on the device of the parameters.

        Images of another size than the run's `views.size` are resized and centre-cropped as held-out images are in
        evaluation: shorter side to size · 256 / 224, antialiased; with a finetuned head bicubic as its training images,
        otherwise bilinear. Images of that size are not changed. Arrays and
        tensors are uint8 (0 to 255), uint16 (0 to 65535) or float (0 to 1, rounded to 256 levels), with 1, 3 or 4
        channels, first or last. Transparency is put on white. The EXIF orientation of files and PIL images is applied.
        """
        interpolation = self.head.interpolation if self.head else "linear"
        return to_pixels(images, self.device, self.config.views.size, self.resize, interpolation)

    def forward(self, images: Images) -> Float[Tensor, "b d"]:
        """Return `pooled`, so that `model(images)` is one vector for each image, as of timm's and DINOv2's encoders."""
        return self.pooled(images)

    def features(self, images: Images) -> Float[Tensor, "b n d"]:
        """Return the features of all patches in row-major order."""
        encoded: Tensor = self.encoder(self.pixels(images))
        return encoded

    def pooled(self, images: Images) -> Float[Tensor, "b d"]:
        """Return the mean of each image's patch features."""
        return self.features(images).mean(dim=1)

    def targets(self, images: Images) -> Float[Tensor, "b n d"]:
        """Return the features in the space of predictions: layer-normalised if the run's loss did so.

        Predictions approximate the teacher's targets. The student's features are only similar to them.
        """
        return normalize_targets(self.features(images), self.config.loss)

    def action(self, *, undo: Sequence[str] = (), apply: Sequence[str] = (), **changes: float) -> Float[Tensor, "k"]:
        """Return the action from a source without jitter: `action(brightness=+0.2, hue=0.05, undo=("grayscale",))`.

        changes: differences of the jitter factors (+0.2 changes a brightness of 1 to 1.2), hue in turns. undo: ops that
        the source has and the target has not. apply: ops that the target has (runs with a destructive target). Without
        arguments: the null action. Raises ConfigError for names and values that did not occur in the run's training.
        """
        return make_action(self.config, self.action_spec, changes, undo, apply).to(self.device)

    def predict(self, images: Images, action: Tensor | None = None) -> Float[Tensor, "b n d"]:
        """Return the predicted target features (see `targets`) of the images after an action.

        action: [k] for all images, or [b, k]; one image with several actions is predicted under each of them. None: the
        null action, the only one where action.conditioning is none. Raises ConfigError for an action that does not fit.
        """
        predictor = self._require_predictor("predict")
        context = self.features(images)
        actions = self._actions(action)
        b = max(len(context), len(actions))
        if len(context) not in (1, b) or len(actions) not in (1, b):
            raise ConfigError(
                f"predict: {len(actions)} actions for {len(context)} images; give one action, or one per image"
            )
        predicted: Tensor = predictor.predict_image(context.expand(b, -1, -1), actions.expand(b, -1))
        return predicted

    @torch.inference_mode(False)
    def infer_action(self, source: Images, target: Images) -> InferredAction:
        """Return the action that leads from each source to its target: the nearest one of a search by gradient.

        One source with several targets is paired with each, and the reverse. The search goes through the predictor, as
        that of `iwm evaluate infer-action`, over the actions of the run's training. It has an answer also where no
        action leads from one image to the other: compare the distances. Raises ConfigError for a model without
        predictor or without actions, and for numbers of images that do not fit.
        """
        predictor = self._require_predictor("infer_action")
        space = action_space(self.config, self.action_spec)
        with torch.no_grad():
            contexts, targets = self.features(source), self.targets(target)
        b = max(len(contexts), len(targets))
        if len(contexts) not in (1, b) or len(targets) not in (1, b):
            raise ConfigError(
                f"infer_action: {len(contexts)} sources and {len(targets)} targets; give one of either, or as many"
            )
        source_of = torch.arange(b, device=self.device) % len(contexts)
        energy = ActionEnergy(predictor.predict_image, contexts, source_of, targets.expand(b, -1, -1), pooled=False)
        _, found = search_by_gradient(energy, space, GradientSettings())
        words = [describe_action(action, self.action_spec) for action in found.actions]
        return InferredAction(found.actions, found.distances, words)

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """Class names by number of each task. Empty without a head."""
        return {name: task.classes for name, task in self.head.tasks.items()} if self.head else {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number; for masks their ids. Raises ConfigError unless there is exactly one task."""
        if len(self.tasks) > 1:
            raise ConfigError(f"classes: this model has several tasks; use model.tasks[{next(iter(self.tasks))!r}]")
        self._require_trial("classes")
        return next(iter(self.tasks.values()))

    def classify(self, images: Images, task: str | None = None) -> Float[Tensor, "b c"]:
        """Return the logits of all classes (`classes`, or `tasks[task]` where the model has several tasks).

        Raises ConfigError without a classification head and for an unknown task.
        """
        trial = self._require_trial("classify", segments=False)
        names = list(self.tasks)
        if task is None and len(names) == 1:
            task = names[0]
        if task not in names:
            raise ConfigError(
                f"classify: give the task, for example task={names[0]!r}; this model has {', '.join(names)}"
            )
        shared = self._shared(self.pixels(images))
        return trial.logits(shared, names.index(task)).float()

    def segment(self, images: Images) -> Float[Tensor, "b c h w"]:
        """Return the logits of all classes for every pixel; `.argmax(1)` gives class numbers (`classes`).

        Images keep their size, which must be the same for all images of a call. Raises ConfigError for other sizes, and
        without a segmentation head.
        """
        trial = self._require_trial("segment", segments=True)
        pixels = to_pixels(images, self.device, size=None)
        height, width = pixels.shape[1:3]
        padded = pad_to_patches(pixels, self.config.encoder.patch_size)
        logits = trial.logits(self._shared(padded), 0).float()
        return upsample(logits, padded.shape[1:3])[:, :, :height, :width]

    def _require_predictor(self, method: str) -> Predictor:
        if self.predictor is None:
            raise ConfigError(
                f"{method}: this model's encoder was finetuned, so the predictor does not fit it; export the run "
                "without --head to predict"
            )
        return self.predictor

    def _require_trial(self, method: str, segments: bool | None = None) -> Trial:
        """Return the trained trial. Raises ConfigError without a head, or for a head of the other kind."""
        if self.trial is None or self.head is None:
            raise ConfigError(
                f"{method}: this model has no head; train one and export it with iwm export RUN OUT "
                "--head RUN/eval/linear"
            )
        if segments is not None and self.head.segments != segments:
            available = "segment" if self.head.segments else "classify"
            raise ConfigError(f"{method}: this model's head is for {self.head.protocol}; call {available}")
        return self.trial

    def _shared(self, images: Real[Tensor, "b h w 3"]) -> SharedInputs:
        """Return the trial's inputs: the images, and features where the encoder is not part of the trial."""
        assert self.head is not None  # checked by _require_trial
        return (
            {PIXELS: images} if self.predictor is None else {PIXELS: images, self.head.features: self.encoder(images)}
        )

    def _actions(self, action: Tensor | None) -> Float[Tensor, "b k"]:
        size = self.action_spec.size
        if action is None:
            return torch.zeros(1, size, device=self.device)
        if not self.action_names:
            raise ConfigError("predict: this model was trained with action.conditioning none; omit the action")
        if action.ndim not in (1, 2) or action.shape[-1] != size or not action.is_floating_point():
            raise ConfigError(
                f"predict: {action.dtype} {list(action.shape)}; an action is float [{size}] or [b, {size}] "
                f"({', '.join(self.action_names)}); make it with model.action(...)"
            )
        return action.reshape(-1, size).to(self.device, torch.float32)

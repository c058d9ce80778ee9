"""Study: trials that are trained at once, and the frozen encoders that they share.

The frozen encoders run once per batch for all trials: linear probes of several learning rates, a pretrained and a
random predictor, several seeds. Trials share no parameters, graphs or generator state, so each trial is bit for bit
the same as if it were trained alone (tests/downstream/test_training.py). Each trial's forward and backward pass ends
before the next trial's begins, so a step needs the memory of the largest trial only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from dali_pipelines.seeds import derive_seed
from iwm.config import ConfigError
from iwm.encoder_outputs import Pool
from iwm.models.attention import to_device
from iwm.models.backbone import Backbone
from iwm.models.predictor_backbone import PredictorBackbone
from iwm.train_config import AttentionImpl

PIXELS = "pixels"

SharedInputs = Mapping[str, Tensor]
"""Inputs of all trials. PIXELS: [b, h, w, 3], uint8 or float grey levels from 0 to 255, for trials that train an
encoder. Name of a frozen encoder: its tokens after the last norm, [b, s, d], prefix tokens (class token) first; or one
token that they are pooled to, [b, 1, d] or [b, 1, 2·d]."""

Evaluated = Literal["val", "selection"]
"""Images that trials are evaluated on: the held-out split, or training images that are held out for the choice."""


class Trial(nn.Module):
    """Module of everything that one trial trains."""

    @abstractmethod
    def loss(self, shared: SharedInputs, targets: Sequence[Tensor]) -> Float[Tensor, ""]:
        """Return the loss. shared: images of all tasks, concatenated by task. targets: those of each task."""

    def forward(self, shared: SharedInputs, targets: Sequence[Tensor]) -> Float[Tensor, ""]:
        """Return `loss`. Training calls the module, which DDP may wrap."""
        return self.loss(shared, targets)

    @abstractmethod
    def logits(self, shared: SharedInputs, task: int) -> Float[Tensor, "..."]:
        """Return the logits of images of one task: [b, classes], or [b, classes, h, w]."""


class FrozenEncoders(nn.Module):
    """Encoders without training; there may be none."""

    def __init__(self, encoders: Mapping[str, Backbone], *, pool: Pool | None = None) -> None:
        """Freeze the encoders. pool: return one token, computed once for all trials; None: return all tokens.

        Raises ConfigError for `cls` and `both` where an encoder has no class token.
        """
        super().__init__()
        if pool in ("cls", "both") and not all(encoder.has_class_token for encoder in encoders.values()):
            raise ConfigError(f"--pool {pool}: this encoder has no class token; use --pool mean")
        self.names, self._pool = tuple(encoders), pool
        self.encoders = nn.ModuleList(encoders.values()).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: Real[Tensor, "b h w 3"]) -> SharedInputs:
        encoders = (cast(Backbone, encoder) for encoder in self.encoders)
        features = {name: self._features(encoder, pixels) for name, encoder in zip(self.names, encoders, strict=True)}
        return {PIXELS: pixels, **features}

    def _features(self, encoder: Backbone, pixels: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        tokens = encoder.tokens(pixels)
        if self._pool is None:
            return tokens
        parts = []
        if self._pool != "mean":
            parts.append(tokens[:, :1])  # a class token is the first of the prefix tokens
        if self._pool != "cls":
            parts.append(tokens[:, encoder.num_prefix_tokens :].mean(1, keepdim=True))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def train(self, mode: bool = True) -> FrozenEncoders:
        return super().train(False)


class Study(nn.Module):
    """Trials and their frozen encoders."""

    def __init__(self, trials: Mapping[str, Trial], encoders: FrozenEncoders, seeds: Sequence[int]) -> None:
        """Hold the trials. seeds: seed of each trial's random values in training (drop path, actions)."""
        super().__init__()
        self.names = tuple(trials)
        self.seeds = tuple(seeds)
        self.trials = nn.ModuleList(trials.values())
        self.encoders = encoders

    def setup(self, device: torch.device, *, compiled: bool = False, attention: AttentionImpl = "auto") -> Study:
        """Move to a device and set the attention implementation.

        compiled: also compile the encoders and predictors of the trials; context.open_run compiles the frozen encoders.
        """
        to_device(self, device, attention)
        for part in self.trials.modules():
            if isinstance(part, Backbone | PredictorBackbone):
                part.setup(device, compiled=compiled, attention=attention)
        return self

    def seed(self, trial: int, pass_index: int, rank: int) -> None:
        """Seed torch's generators for a trial's forward pass.

        rank: of the process. Together with the trial's seed, pass and rank determine all its random values: trials with
        the same seed have the same values, and so has a resumed training.
        """
        torch.manual_seed(derive_seed(self.seeds[trial], pass_index, rank, bits=63))

    @torch.no_grad()
    def predict(self, inputs: Tensor | SharedInputs, task: int, trials: Sequence[int]) -> list[Tensor]:
        """Return the float32 logits of some trials for images of one task."""
        shared = self.shared_inputs(inputs)
        return [self.trial(number).logits(shared, task).float() for number in trials]

    def trial(self, number: int) -> Trial:
        """Return the trial of this index."""
        return cast(Trial, self.trials[number])

    def shared_inputs(self, inputs: Tensor | SharedInputs) -> SharedInputs:
        """Return the trials' inputs: the frozen encoders' features of pixels; features are returned unchanged."""
        return cast(SharedInputs, self.encoders(inputs)) if isinstance(inputs, Tensor) else inputs

    def state_dicts(self) -> dict[str, Tensor]:
        """Return the trials' parameters and buffers, all that training changes. Names begin with the index."""
        return self.trials.state_dict()


class Task(Protocol):
    """Interface between a task and the training."""

    name: str
    metric: str
    """Metric of `evaluate` by which the best epoch is chosen; higher is better."""
    proportion_metrics: tuple[str, ...]
    """Metrics that are shares of the held-out images and have a standard error over them."""

    @property
    def images(self) -> int:
        """Images of an epoch, over all processes."""

    def get_batch(self, pass_index: int) -> tuple[Tensor | SharedInputs, Tensor]:
        """Return inputs and targets of pass `pass_index` (from 0) of this process's training, on the device."""

    def state(self) -> dict[str, Any]:
        """Return the state from which `get_batch` resumes, in addition to the number."""

    def evaluate(
        self, study: Study, task_index: int, trials: Sequence[int], images: Evaluated = "val"
    ) -> list[dict[str, Any]]:
        """Return the metrics of some trials on held-out images, the same on every process.

        task_index: index of the task in the study.
        """

    def metadata(self) -> dict[str, Any]:
        """Return the task's entries of a result, after `evaluate`."""

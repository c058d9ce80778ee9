"""Plan, progress and files of a downstream training.

RUN/eval/NAME/ contains last.pt, to resume from, and best.pt, the best trial in its best epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dali_pipelines.crops import Interpolation
from iwm.config import ConfigError
from iwm.config_io import flat_diff, split_changes
from iwm.downstream.study import Study, Task
from iwm.encoder_outputs import EncoderName, LayerNormKind
from iwm.training.checkpoint import CheckpointError, load_verified, save_atomic

Scores = list[dict[str, dict[str, Any]]]
"""Scores of every trial, by task and metric (top1, …); numbers, except for details such as per_class."""


Selection = Literal["train", "val", "none"]
"""Images by which trial and epoch are chosen: training images that are held out, or the held-out split.
`none`: there is nothing to choose, and the last epoch is the best."""


@dataclass
class TrainPlan:
    """Plan of a training that starts or resumes."""

    title: str
    """Title of the progress display."""
    folder: Path
    """RUN/eval/NAME: metrics.jsonl, last.pt, best.pt."""
    identity: dict[str, Any]
    """Flat settings and checkpoint. Training resumes only if they are the same."""
    study: Study
    tasks: Sequence[Task]
    task_ids: list[tuple[int, ...]]
    """Indices of each trial's tasks."""
    optimizers: list[torch.optim.Optimizer]
    """Optimiser of each trial."""
    lr_factor: Callable[[int], float]
    """Function from a step to its factor of the peak learning rate (0 to 1)."""
    steps: int
    """Optimiser steps in total."""
    steps_per_epoch: float
    batch_size: int
    """Images of a step, over all tasks and processes."""
    accumulation: int
    """Passes of a step."""
    bf16: bool
    """Compute in bfloat16 autocast."""
    selection: Selection
    validate_every: float
    """Interval of evaluation (epochs)."""
    checkpoint_every: int
    """Interval of last.pt (steps)."""
    log_every: int
    """Interval of lines in metrics.jsonl (steps)."""
    tensorboard: bool
    micro_batch_state: dict[str, Any] = field(default_factory=dict)
    """Micro-batch size, processes and device, for last.pt (micro_batch_state)."""
    startup_messages: list[str] = field(default_factory=list)
    """Lines to print before the first step."""
    best_metadata: dict[str, Any] = field(default_factory=dict)
    """Entries of best.pt that are needed to rebuild the trial."""

    @property
    def full_trials(self) -> list[int]:
        """Indices of the trials that learn every task. Only these can be the best trial, because a single task may be
        easier."""
        return [trial for trial, task_ids in enumerate(self.task_ids) if len(task_ids) == len(self.tasks)]

    def chosen(self, choices: Sequence[float]) -> int:
        """Return the index of the chosen trial: the best by `choices` (choice_score), or the first full one."""
        return self.full_trials[0] if self.selection == "none" else max(self.full_trials, key=choices.__getitem__)


@dataclass
class TrainProgress:
    """Progress of a training."""

    step: int = 0
    """Optimiser steps taken."""
    scores: Scores = field(default_factory=list)
    """Scores of the last evaluation."""
    best: list[dict[str, float]] = field(default_factory=list)
    """Each trial's best evaluation: its `epoch`, the mean over its tasks (`score`, 0 to 1) on the held-out split, and
    with Selection `train` the same on the images of the selection (`selection`), by which it is the best."""
    skipped: list[int] = field(default_factory=list)
    """Number of each trial's steps with a non-finite gradient, which changed nothing."""


def choice_score(best: Mapping[str, float]) -> float:
    """Return the score by which a trial's best evaluation was chosen."""
    return best.get("selection", best["score"])


@dataclass(frozen=True)
class TaskInfo:
    """A task that a head was trained for."""

    classes: tuple[str, ...]
    """Class names by number; for masks their ids."""
    data: dict[str, Any]
    """Shards, splits, label column, numbers of images, and chance: the accuracy (0 to 1) of always predicting the
    majority class, None for masks."""
    scores: dict[str, Any]
    """On the held-out images, 0 to 1: top1 and top5, or miou and pixel_accuracy."""


@dataclass(frozen=True)
class TrainedHead:
    """Description of a trial that was trained on a checkpoint."""

    protocol: str
    trial: str
    checkpoint: str
    """File name and digest of the checkpoint that it was trained on."""
    epoch: float
    """Best epoch, whose parameters were saved."""
    metadata: dict[str, Any]
    """Settings that distinguish the trial: features, lr, seed, predictor, tokens, part, …"""
    channels: int | None
    """Channels inside UPerNet; None for classification."""
    tasks: dict[str, TaskInfo]
    layer_norm: LayerNormKind = "shared"
    """Norms of the layers that UPerNet receives. Heads that were trained before there was a choice have `shared`."""
    interpolation: Interpolation = "linear"
    """Interpolation of the resize of its training images, and so of images to classify."""
    selection: Selection = "val"
    """Images by which trial and epoch were chosen."""

    @property
    def features(self) -> EncoderName:
        """Encoder that the head was trained on."""
        features: EncoderName = self.metadata["features"]
        return features

    @property
    def num_classes(self) -> list[int]:
        """Number of classes of each task."""
        return [len(task.classes) for task in self.tasks.values()]

    @property
    def segments(self) -> bool:
        """True for segmentation: a class for every pixel."""
        return self.channels is not None


FORMAT = "downstream-3"
LAST, BEST = "last.pt", "best.pt"

RESUMABLE_CHANGES = (
    "output",
    "device",
    "num_threads",
    "compile",
    "micro_batch_size",
    "activation_checkpointing",
    "checkpoint_every",
    "log_every",
    "tensorboard",
    "data.num_threads",
    "data.prefetch_queue_depth",
)
"""Options that may change when a training resumes, because they are not part of the recipe. Device, compile and
micro_batch_size change rounding and random values; micro_batch_size also changes the batch of batch norms."""


def load_last(folder: Path, identity: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Return the content of last.pt to resume from; None where there is no last.pt.

    identity: flat settings that must be the same. Raises ConfigError, naming each difference, where they are not, and
    CheckpointError for a damaged file.
    """
    path = folder / LAST
    if not path.exists():
        return None
    try:
        content = load_verified(path, FORMAT, device)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete it to restart this training") from error
    _, refused = split_changes(flat_diff(content["identity"], identity), RESUMABLE_CHANGES)
    if refused:
        changes = ", ".join(f"{name} {now} (it was {then})" for name, (then, now) in sorted(refused.items()))
        raise ConfigError(
            f"{folder} holds a training with other settings: {changes}; set them back, delete the folder, or choose "
            "another --output"
        )
    return content


def save_state(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a file of the folder. Raises OSError; the previous file then stays unchanged."""
    save_atomic(folder / name, {"format": FORMAT, **content})

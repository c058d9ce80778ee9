"""A training as it is planned, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from iwm.downstream.classification import Task
from iwm.downstream.study import Study

Scores = list[dict[str, dict[str, Any]]]
"""Of every arm, by task, by figure (top1, …); all but details are numbers."""


@dataclass
class Plan:
    """A training, ready to begin or to go on."""

    title: str
    folder: Path
    """RUN/eval/NAME: metrics.jsonl, last.pt, best.pt."""
    identity: dict[str, Any]
    """Settings and checkpoint, flat: what must be the same for a training to go on."""
    study: Study
    tasks: Sequence[Task]
    solves: list[tuple[int, ...]]
    """The tasks of each arm."""
    optimizers: list[torch.optim.Optimizer]
    """Of each arm."""
    rate: Callable[[int], float]
    """Share of the highest learning rate at a step."""
    steps: int
    steps_per_epoch: float
    batch: int
    """Images of a step: of all tasks and processes."""
    accumulation: int
    """Passes of a step."""
    bf16: bool
    validate_every: float
    """Epochs."""
    checkpoint_every: int
    log_every: int
    tensorboard: bool
    split: dict[str, Any] = field(default_factory=dict)
    """Micro-batch, processes and device, as last.pt has them (micro_batch.split_of)."""
    opening: list[str] = field(default_factory=list)
    """What is said before the first step."""
    to_keep: dict[str, Any] = field(default_factory=dict)
    """What best.pt holds beside the arm: how to build it again."""

    @property
    def whole(self) -> list[int]:
        """The arms that solve every task, of which the best is kept: a control of one task alone may be easier."""
        return [arm for arm, solved in enumerate(self.solves) if len(solved) == len(self.tasks)]


@dataclass
class Progress:
    """How far a training has come."""

    step: int = 0
    scores: Scores = field(default_factory=list)
    """Of the last look at the held-out images."""
    best: list[dict[str, float]] = field(default_factory=list)
    """Of each arm: its best mean over its tasks (`score`), and the epoch that it was seen after."""
    skipped: list[int] = field(default_factory=list)
    """Steps of each arm whose gradient was not finite: they changed nothing."""

"""Options of the evaluators that ask what a model knows of actions.

This module imports neither torch nor DALI, as settings.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from iwm.encoder_outputs import EncoderName
from iwm.evaluation.settings import BankSettings, Distance, EvalSettings
from iwm.ranges import Range
from iwm.search_settings import CEMSettings, GradientSettings, SearchName


@dataclass(frozen=True)
class CompositionSettings(EvalSettings):
    """Predictions in a row: two actions against one, an action and its inverse, an action in equal steps."""

    bank: BankSettings = field(default_factory=lambda: BankSettings(num_views=64))
    num_queries: Annotated[int, Range(min=2)] = 12
    """Pairs of views per image, 2 to --bank.num-views.
    The bank is random, so fewer queries only increase the variance."""
    passes: Annotated[int, Range(min=1)] = 4
    """Largest number of equal steps that the action to a view is divided into, one pass of the predictor each."""
    encoder: EncoderName = "teacher"
    """Encoder of the source: `teacher` (target encoder) or `student` (context encoder)."""


@dataclass(frozen=True)
class RegressorSettings:
    """Baseline: a small network that reads the action from the encoder's pooled features of source and target."""

    split: str | None = None
    """Split that it is trained on. Default: the run's training split (data.train)."""
    num_images: Annotated[int, Range(min=10)] = 512
    """Training images, the first of the split; all where it has fewer."""
    num_targets: Annotated[int, Range(min=2)] = 8
    """Pairs of each training image, at least 2."""
    width: Annotated[int, Range(min=1)] = 256
    """Units of the hidden layer."""
    epochs: Annotated[int, Range(min=1)] = 60
    """Largest number of epochs. The best one is chosen on a fifth of the training images."""
    penalties: Annotated[tuple[float, ...], Range(min=0)] = (1e-3, 1e-1)
    """Weight decays to choose from, on the same fifth."""


@dataclass(frozen=True)
class InferActionSettings(EvalSettings):
    """Action from a source to a target, found by search through the predictor and compared with the true one."""

    num_images: Annotated[int, Range(min=2)] = 16
    """Images, at least 2; all where the split has fewer. The standard error is over images."""
    num_targets: Annotated[int, Range(min=2)] = 4
    """Pairs of each image, at least 2."""
    search: tuple[SearchName, ...] = ("gradient",)
    """Searches: `gradient` (a lattice of actions, then descent) and `cem` (cross-entropy method)."""
    distance: Distance = "per_token"
    """Features that prediction and target are compared by: `per_token`, or `pooled`, averaged over tokens.
    Over tokens the answers have smaller errors, because an average hides a part of what an action changes."""
    gradient: GradientSettings = field(default_factory=GradientSettings)
    cem: CEMSettings = field(default_factory=CEMSettings)
    control: Path | None = None
    """Run with the same views that was trained with --action.shuffle, so that its predictor knows no action.
    The same search goes through its predictor. None: no such column."""
    regressor: RegressorSettings = field(default_factory=RegressorSettings)
    num_shown: Annotated[int, Range(min=0)] = 4
    """Images in the figure, the first of --num-images; 0: no figure."""
    batch_size: Annotated[int, Range(min=1)] = 256
    """Images and predictions computed at a time. Lower it when the device runs out of memory."""

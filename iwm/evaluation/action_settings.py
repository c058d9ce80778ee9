"""Options of the evaluators that ask what a model knows of actions.

This module imports neither torch nor DALI, as settings.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from iwm.encoder_outputs import EncoderName
from iwm.evaluation.settings import BankSettings, EvalSettings
from iwm.ranges import Range


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

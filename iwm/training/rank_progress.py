"""Phase and step of a process, for its watchdog and for the other processes of the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

GRACE = 5.0
"""Time without progress (seconds) after which a process that was told to end is taken to hang; see `patience`."""


class Phase(StrEnum):
    """Part of a run. The values are the words of messages."""

    STARTING = "starting"
    FIRST_STEP = "in its first step"
    VALIDATING = "validating"
    SAVING = "saving a checkpoint"
    WAITING = "waiting for data"
    TRAINING = "training"
    ENDING = "ending"


UNMEASURED = {Phase.VALIDATING: 20.0, Phase.SAVING: 20.0, Phase.ENDING: 40.0}
"""Times of phases (seconds) before they were measured."""


class RankProgress:
    """Phase and step of this process, set by the training loop and read by the watchdog's threads.

    Setting them costs a microsecond and never waits.
    """

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.step: int | None = None
        """Number of completed optimiser steps of the run; None before the first one of this process."""
        self.since = time.monotonic()
        """Time of the last sign of progress."""
        self.launcher_lost = False
        """True where the launcher of this or, by agreement (StopConsensus), of any process is gone."""
        self._interlude: Phase | None = None
        self._step_ended = self.since
        self._times: dict[Phase, float] = {}
        self._writers = 0

    def enter(self, phase: Phase) -> None:
        """Begin a phase."""
        if phase in (Phase.WAITING, Phase.TRAINING) and self.step is None:
            phase = Phase.FIRST_STEP
        if phase in (Phase.VALIDATING, Phase.SAVING):
            self._interlude = phase
        self.phase, self.since = phase, time.monotonic()

    def complete_step(self, step: int) -> None:
        """Record that the run has `step` completed steps."""
        now = time.monotonic()
        if self.step is not None:
            kind = self._interlude or Phase.TRAINING
            # Decays, so that one slow step is forgotten.
            self._times[kind] = max(0.9 * self._times.get(kind, 0.0), now - self._step_ended)
        self._interlude, self._step_ended = None, now
        self.step, self.since = step, now

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Mark that a checkpoint is being written, by any thread: the watchdog does not end the process meanwhile."""
        self._writers += 1
        try:
            yield
        finally:
            self._writers -= 1
            self.since = time.monotonic()

    @property
    def is_writing(self) -> bool:
        return self._writers > 0

    @property
    def patience(self) -> float:
        """Time without progress (seconds) after which this process hangs, if it was told to end.

        Three times what the phase takes, at least GRACE. After a validation or a checkpoint, which rank 0 makes alone,
        the other ranks wait for it in the next step: their patience is that of the validation or the checkpoint.
        """
        kind = self.phase
        if kind in (Phase.WAITING, Phase.TRAINING):
            kind = self._interlude or Phase.TRAINING
        return max(GRACE, 3 * self._times.get(kind, UNMEASURED.get(kind, 0.0)))

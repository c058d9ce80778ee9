"""SIGTERM and SIGUSR1 end a run after its current step, with a checkpoint and exit status 0; Ctrl-C does the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopWish:
    """Whether a signal has asked this process to stop, and which one."""

    signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopWish]:
    """Turn the first stop signal into a wish; a second Ctrl-C interrupts at once."""
    wish = StopWish()

    def handler(number: int, frame: FrameType | None) -> None:
        if wish and number == signal.SIGINT:
            raise KeyboardInterrupt
        wish.signal = signal.Signals(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield wish
    finally:
        for number, old in before.items():
            signal.signal(number, old)

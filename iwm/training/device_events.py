"""Moments in a device's work, which the host can ask for and measure between without waiting."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class DeviceEvent(Protocol):
    """Moment in a device's work; the part of torch.cuda.Event that windows need."""

    def query(self) -> bool:
        """Return True where the device has passed the event."""

    def synchronize(self) -> None:
        """Wait until the device has passed the event."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the device's time (ms) from this event to a later one; both must have completed."""


class HostEvent:
    """Event of a CPU, whose work is done when an operator returns."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: HostEvent) -> float:
        return 1e3 * (end_event._time - self._time)


def record_event(device: torch.device) -> DeviceEvent:
    """Record an event after all work queued on the device's current stream."""
    if device.type != "cuda":
        return HostEvent()
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    return event

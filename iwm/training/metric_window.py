"""Metrics of a window of steps, which the host reads only when the device has computed them.

Reading a value makes the host wait for the device, and the device's queue runs empty meanwhile. At the end of a window
the metrics are therefore copied to host memory without waiting, and an event is recorded after the copy. Their line is
written when the event has completed, which the host checks after every step: on a GPU a step or two later, on a CPU at
once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dali_pipelines.outputs import SampleKeys
from iwm.training.device_events import DeviceEvent, record_event
from iwm.training.distributed import DistEnv
from iwm.training.rank_clock import RankClock, RankTimes
from iwm.training.step import StepResult


def copy_to_host(tensor: Tensor) -> Tensor:
    """Start to copy a tensor to pinned host memory; it is there once an event recorded afterwards has completed.

    A tensor in host memory is returned as it is.
    """
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class CheckpointPause(NamedTuple):
    """Pause of training for a checkpoint: the copy of its state, and the wait for the checkpoint before."""

    began: DeviceEvent
    ended: DeviceEvent

    def seconds(self) -> float:
        """Return its length by the device's clock (seconds). Waits until the device has passed its end."""
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1e3


class WindowMetrics(NamedTuple):
    """Metrics of a window, in host memory."""

    loss: Float[Tensor, "steps *trials"]
    """Loss of each step (and trial), averaged over processes."""
    gradient_norm: Float[Tensor, "steps *trials"]
    skipped: Bool[Tensor, "steps *trials"]
    speed: dict[str, float]
    """`images_per_second`, by the device's clock, and `data_wait`: the share of the host's time that it waited for data
    (0 to 1). With several processes also what RankTimes.metrics returns."""
    straggler: str | None = None
    """Sentence on a rank that all others wait for, None without one."""


@dataclass
class EndedWindow:
    """Window whose metrics are being copied to the host."""

    tensors: tuple[Tensor, Tensor, Tensor]
    """Loss, gradient norm and skipped flags in host memory, undefined until `ended` has completed."""
    began: DeviceEvent
    ended: DeviceEvent
    images: int
    data_wait: float
    ranks: RankTimes | None = None
    """Times of all processes; None with a single one."""

    @property
    def is_complete(self) -> bool:
        """True where `read` does not wait."""
        return self.ended.query() and (self.ranks is None or self.ranks.is_complete)

    def read(self, *, without_others: bool = False) -> WindowMetrics:
        """Return the metrics. Waits for the device and the other processes' times unless `is_complete`.

        without_others: leave out times of the other processes that have not arrived.
        """
        self.ended.synchronize()
        seconds = self.began.elapsed_time(self.ended) / 1e3
        speed, straggler = {"images_per_second": self.images / seconds, "data_wait": self.data_wait}, None
        if self.ranks is not None and (self.ranks.is_complete or not without_others):
            speed, straggler = speed | self.ranks.metrics(), self.ranks.straggler()
        return WindowMetrics(*self.tensors, speed, straggler)


@dataclass
class MetricWindow:
    """Results of the steps since the last window ended. Their tensors stay on the device."""

    device: torch.device
    results: list[StepResult] = field(default_factory=list)
    """Result of each step: scalars, or vectors with one entry per trial."""
    keys: list[list[SampleKeys]] = field(default_factory=list)
    """Sample keys of each step's batches; optional. Read only if a step was skipped."""
    waited: float = 0.0
    """Time that the host waited for data (seconds)."""
    checkpoint_pause: CheckpointPause | None = None
    """Pause for the checkpoint after which the window began; None for a window that began otherwise."""

    def __post_init__(self) -> None:
        self._began, self._host_began = record_event(self.device), time.perf_counter()

    def end(self, dist: DistEnv, batch: int, clock: RankClock | None = None) -> EndedWindow:
        """Average over processes and start to copy the metrics to the host, without waiting for the device.

        batch: number of images per step. Every process must end the same windows in the same order. clock: times of
        this process's steps, which all processes then exchange.
        """
        loss, norm, skipped = (torch.stack(values) for values in zip(*self.results, strict=True))
        loss = dist.mean(loss)
        tensors = copy_to_host(loss), copy_to_host(norm), copy_to_host(skipped)
        data_wait = self.waited / (time.perf_counter() - self._host_began)
        return EndedWindow(
            tensors,
            self._began,
            record_event(self.device),
            len(self.results) * batch,
            data_wait,
            clock.exchange(data_wait) if clock is not None else None,
        )


class MetricQueue:
    """Ended windows, oldest first, each with the function that writes its line.

    Leaving its context writes what is left, also after an exception.
    """

    def __init__(self) -> None:
        self._windows: deque[tuple[EndedWindow, Callable[[WindowMetrics], None]]] = deque()

    def append(self, window: EndedWindow, write: Callable[[WindowMetrics], None]) -> None:
        """Append a window; `write` is called with its metrics, once, after those of all windows before it."""
        self._windows.append((window, write))

    def write_ready(self) -> None:
        """Write the windows whose metrics have arrived. Does not wait."""
        while self._windows and self._windows[0][0].is_complete:
            self._write_oldest()

    def write_all(self, *, without_others: bool = False) -> None:
        """Wait for the metrics of all windows and write them. without_others: as in EndedWindow.read."""
        while self._windows:
            self._write_oldest(without_others)

    def _write_oldest(self, without_others: bool = False) -> None:
        window, write = self._windows[0]
        metrics = window.read(without_others=without_others)
        self._windows.popleft()
        write(metrics)

    def __enter__(self) -> MetricQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an exception, other processes may be gone.
        self.write_all(without_others=value is not None)

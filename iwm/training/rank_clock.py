"""Times of every process, to name the one that the others wait for.

All processes end a step together, because gradients are averaged in it, so the time of a step does not tell which one
is slow. What does is the time from the beginning of a step until a process first waits for the others: its data, masks
and forward pass. It is measured between events on the device, so neither host nor device waits for it.
"""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from iwm.training.device_events import DeviceEvent, record_event
from iwm.training.distributed import DistEnv

SLOW = 1.5
"""Factor of the other ranks' median time from which a rank is named, if it is the slowest in two windows in a row."""


class RankClock:
    """Times of this process's steps until it waits for the others. Inactive with a single process."""

    def __init__(self, dist: DistEnv, module: nn.Module) -> None:
        """Watch the forward passes of `module` in training.

        DDP's forward pass waits for no other process, a sharded model's does from its beginning: there only the time
        before it counts. Every process must call this.
        """
        self._dist = dist
        self.hosts: list[str] = dist.all_gather(socket.gethostname())
        """Host of each rank."""
        self.suspect: int | None = None
        """Rank that was much slower than the others in the last window."""
        self.named: set[int] = set()
        """Ranks that `RankTimes.straggler` has named."""
        self._began: DeviceEvent | None = None
        self._arrived: DeviceEvent | None = None
        self._steps: list[tuple[DeviceEvent, DeviceEvent]] = []
        if dist.size == 1:
            return
        if isinstance(module, DistributedDataParallel):
            module.register_forward_hook(lambda *_: self._arrive(again=True))
        else:
            module.register_forward_pre_hook(lambda *_: self._arrive(again=False))

    def start(self) -> None:
        """Begin a step, before its data are asked for."""
        if self._dist.size > 1:
            self._end_step()
            self._began = record_event(self._dist.device)

    def _arrive(self, again: bool) -> None:
        """Record the arrival at the others: of a step with several passes the last one if `again`, else the first."""
        if self._began is not None and (again or self._arrived is None):
            self._arrived = record_event(self._dist.device)

    def _end_step(self) -> None:
        if self._began is not None and self._arrived is not None:
            self._steps.append((self._began, self._arrived))
        self._began = self._arrived = None

    def exchange(self, data_wait: float) -> RankTimes | None:
        """Start to exchange the mean time of the steps that the device has completed; None with a single process.

        Steps that it has not are counted in the next exchange. data_wait: share of this process's time (0 to 1).
        """
        if self._dist.size == 1:
            return None
        self._end_step()
        done = [(began, arrived) for began, arrived in self._steps if arrived.query()]
        self._steps = self._steps[len(done) :]
        times = [began.elapsed_time(arrived) for began, arrived in done]
        return RankTimes(self, data_wait, sum(times) / len(times) if times else 0.0, self._dist.size)


class RankTimes:
    """Times of all processes in a window of steps, on their way to this one over gloo."""

    def __init__(self, clock: RankClock, data_wait: float, milliseconds: float, size: int) -> None:
        self._clock = clock
        own = torch.tensor([data_wait, milliseconds], dtype=torch.float64)
        self._all = [torch.empty_like(own) for _ in range(size)]
        self._work: Any = torch.distributed.all_gather(self._all, own, async_op=True)

    @property
    def is_complete(self) -> bool:
        return bool(self._work.is_completed())

    def _table(self) -> tuple[list[float], list[float]]:
        """Return each rank's data_wait and time (ms). Waits for them unless `is_complete`."""
        self._work.wait()
        waits, times = torch.stack(self._all).T.tolist()
        return waits, times

    def metrics(self) -> dict[str, float]:
        """Return the largest data_wait, mean and maximum of the ranks' times (ms), and the slowest rank."""
        waits, times = self._table()
        return {
            "data_wait_max": max(waits),
            "rank_ms_mean": sum(times) / len(times),
            "rank_ms_max": max(times),
            "slowest_rank": times.index(max(times)),
        }

    def straggler(self) -> str | None:
        """Return a sentence on a rank that is SLOW in two windows in a row, once per rank. Call it once per window."""
        waits, times = self._table()
        slowest, clock = times.index(max(times)), self._clock
        others = sorted(times[:slowest] + times[slowest + 1 :])
        median = others[len(others) // 2]
        suspect, clock.suspect = clock.suspect, slowest if times[slowest] > SLOW * median else None
        if clock.suspect is None or clock.suspect != suspect or slowest in clock.named:
            return None
        clock.named.add(slowest)
        return (
            f"rank {slowest} on host {clock.hosts[slowest]} is slow: {times[slowest]:,.1f} ms per step before it waits "
            f"for the others, whose median is {median:,.1f} ms; {waits[slowest]:.0%} of its time it waits for data"
        )

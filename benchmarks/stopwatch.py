"""Time, memory and compilations of steps: the few things that are read off a running process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters

from iwm.training.loop import collecting_by_hand


class Window(NamedTuple):
    """Some steps in a row."""

    steps: list[float]
    """Seconds of each."""
    cpu_seconds: float
    """CPU time of all this process's threads in all of them."""
    waited: float = 0.0
    """Seconds that the host waited for data in all of them."""

    @property
    def seconds(self) -> float:
        return sum(self.steps)


def timed(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Seconds of each of `steps` calls in a row, as `watch` takes them."""
    return watch(step, steps, device).steps


def watch(step: Callable[[], object], steps: int, device: torch.device) -> Window:
    """Call `step` so many times.

    On a GPU by events that are laid between the steps: the host waits before the first and after the last, never in
    between, so that it may run ahead as it does in training. The garbage collector rests, as it does there.
    """
    with collecting_by_hand():
        used = time.process_time()
        seconds = _by_events(step, steps, device) if device.type == "cuda" else _by_the_clock(step, steps)
        return Window(seconds, time.process_time() - used)


def _by_the_clock(step: Callable[[], object], steps: int) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(steps):
        step()
        marks.append(time.perf_counter())
    return [end - start for start, end in pairwise(marks)]


def _by_events(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize(device)
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def forget_peak(device: torch.device) -> None:
    """From now on `peak_gib` counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # 5: "reset the peak resident set size to the current one" (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")


def release_memory(device: torch.device) -> None:
    """Free what nothing refers to any more: compiled models are cycles, and torch's allocator keeps freed memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_gib(device: torch.device) -> float:
    """Peak memory since `forget_peak`: of torch's allocator on a GPU (DALI has its own), of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 2**20


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far."""
    return int(counters["stats"]["unique_graphs"])

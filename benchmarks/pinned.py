"""Measure a stream of batches in a process of its own, pinned to given cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import NamedTuple

Stream = Callable[[], Iterator[int]]
"""Builds an endless stream of batches; yields the images of each. Picklable."""


class Rate(NamedTuple):
    """Images per second of one stretch of time."""

    wall: float
    """By the clock: what a user sees on an idle machine."""
    core: float
    """By the CPU time of the process and its workers: the rate of one whole core, also where the core is shared."""


def measure(stream: Stream, cores: list[int], seconds: float, windows: int) -> list[Rate]:
    """Rates of `windows` equal stretches of `seconds` in all, after a warm-up of a fifth of that.

    A fresh process for each call: no memory, thread or cache of another contender is left in it.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_pin, initargs=(cores,)) as process:
        return process.submit(_measure, stream, seconds, windows).result()


def _pin(cores: list[int]) -> None:
    os.sched_setaffinity(0, cores)


def _measure(stream: Stream, seconds: float, windows: int) -> list[Rate]:
    batches = stream()
    next(batches)
    _rate(batches, seconds / 5)
    return [_rate(batches, seconds / windows) for _ in range(windows)]


def _rate(batches: Iterator[int], seconds: float) -> Rate:
    start, used, images = time.perf_counter(), _cpu_seconds(), 0
    while time.perf_counter() - start < seconds:
        images += next(batches)
    return Rate(images / (time.perf_counter() - start), images / (_cpu_seconds() - used))


def _cpu_seconds() -> float:
    """User and system time of this process, all its threads, and its living worker processes."""
    ticks = 0
    for worker in active_children():
        # The name, in brackets, may hold spaces; utime and stime are the 12th and 13th fields after it.
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")

"""Measurement tools: step times, memory, compilations, turns, loader rates, profiles.

Measurements are interleaved in turns, so that a temporary slowdown of the machine affects all of them. Loaders are
measured in their own process, pinned to given cores. torch's profiler gives a trace and the most expensive operators.
"""

from __future__ import annotations

import gc
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch._dynamo.utils import counters
from torch.autograd.profiler_util import EventList, FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from iwm.training.distributed import DistEnv
from iwm.training.runtime import manual_gc


class StepTimings(NamedTuple):
    """Times of consecutive steps."""

    steps: list[float]
    """Time of each step (seconds)."""
    cpu_seconds: float
    """CPU time of all threads of this process over all steps (seconds)."""
    waited: float = 0.0
    """Time that the host waited for data over all steps (seconds)."""

    @property
    def seconds(self) -> float:
        return sum(self.steps)


def timed(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Return the seconds of each of `steps` consecutive calls, as measured by `time_steps`."""
    return time_steps(step, steps, device).steps


def time_steps(step: Callable[[], object], steps: int, device: torch.device) -> StepTimings:
    """Time `steps` consecutive calls of `step`.

    On a GPU, events are recorded between the steps. The host synchronises only before the first and after the last, so
    that it can run ahead as in training. Automatic garbage collection is off, as in training.
    """
    with manual_gc():
        used = time.process_time()
        seconds = _by_events(step, steps, device) if device.type == "cuda" else _by_the_clock(step, steps)
        return StepTimings(seconds, time.process_time() - used)


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
    """Reset the peak of `peak_gib`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # 5: "reset the peak resident set size to the current one" (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")


def release_memory(device: torch.device) -> None:
    """Free unreferenced memory: compiled models, which are reference cycles, and torch's cached blocks."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_gib(device: torch.device) -> float:
    """Return the peak memory since `forget_peak` (GiB): what torch reserved on a GPU (without DALI), else the process.

    A CUDA graph's activations are allocated when it is captured, so replays would not count as allocations.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 2**20


def compiled_graphs() -> int:
    """Return the number of graphs that torch.compile has compiled in this process so far."""
    return int(counters["stats"]["unique_graphs"])


MIN_STEPS = 5
"""Minimum number of steps of one window."""


class Measured(NamedTuple):
    """Measurable step function with its images and FLOPs."""

    window: Callable[[int], StepTimings]
    """Function that runs and times the given number of steps."""
    images: int
    """Number of images per step on this process."""
    flops: float | None = None
    """FLOPs needed per image, as counted in iwm/models/flops.py; None where nothing is trained."""


class Repeat(NamedTuple):
    """Result of one window."""

    window: StepTimings
    images_per_second: float
    """Rate of all processes together, by wall time."""
    images_per_cpu_second: float
    """Rate of this process by CPU time. It does not depend on other load or on the number of cores."""
    memory_gib: float
    """Largest peak memory of a process (GiB)."""


def interleave(
    measured: Mapping[str, Measured],
    dist: DistEnv,
    *,
    seconds: float,
    repeats: int,
    settling: int,
    between: Callable[[], None],
    status: Callable[[str], None],
    report: Callable[[str], None],
) -> dict[str, list[Repeat]]:
    """Measure all in turns: each for `seconds` in total, in `repeats` windows. `between` is called after each round.

    status, report: functions of a line of text, called before and after each window.
    Every window begins with `settling` unmeasured steps. The number of steps of a window follows from the time of
    `settling` further steps in the first round, and is the same on all processes.
    """
    turns: dict[str, list[Repeat]] = {name: [] for name in measured}
    steps: dict[str, int] = {}
    for turn in range(repeats):
        for name, (window_of, images, _) in measured.items():
            status(f"turn {turn + 1} of {repeats}: {name}")
            window_of(settling)
            if name not in steps:
                slowest = max(dist.all_gather(window_of(settling).seconds / settling))
                steps[name] = max(MIN_STEPS, math.ceil(seconds / repeats / slowest))
            forget_peak(dist.device)
            window = window_of(steps[name])
            peak = max(dist.all_gather(peak_gib(dist.device)))
            rate = sum(dist.all_gather(images * len(window.steps) / window.seconds))
            turns[name].append(Repeat(window, rate, images * len(window.steps) / window.cpu_seconds, peak))
            report(f"turn {turn + 1} of {repeats}: {name} {rate:,.0f} images/s")
        between()
    return turns


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return median, p10 and p90 with four significant digits."""
    p10, median, p90 = (float(f"{p:.4g}") for p in np.percentile(values, (10, 50, 90)))
    return {"median": median, "p10": p10, "p90": p90}


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Return the ratio of two measurements over paired turns, in which a slowdown of a whole turn cancels."""
    ratios = [float(f"{a / b:.4g}") for a, b in zip(over, under, strict=True)]
    return {"median": float(np.median(ratios)), "lowest": min(ratios), "highest": max(ratios)}


def ratio_text(ratio: Mapping[str, float] | None) -> str:
    """Return a ratio of paired turns as `median (lowest–highest)`; '' for None."""
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f}–{ratio['highest']:.2f})" if ratio else ""


Stream = Callable[[], Iterator[int]]
"""Picklable function that builds an endless stream of batches, which yields the number of images of each."""


class Rate(NamedTuple):
    """Images per second of one window."""

    wall: float
    """Images per second of wall time, as a user sees it on an idle machine."""
    core: float
    """Images per second of CPU time of the process and its workers: the rate of one core, even if the core is shared.
    """


def measure(stream: Stream, cores: list[int] | None, seconds: float, windows: int) -> list[Rate]:
    """Return the rates of `windows` equal windows of `seconds` in total, after a warm-up of a fifth of that.

    Each call uses a new process, free of memory, threads and caches of other loaders. cores: CPU cores that it is
    pinned to; None: all that it may use.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_pin, initargs=(cores,)) as process:
        return process.submit(_measure, stream, seconds, windows).result()


def _pin(cores: list[int] | None) -> None:
    if cores is not None:
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
    """Return the user and system time of this process, all its threads, and its live worker processes."""
    ticks = 0
    for worker in active_children():
        # The name, in brackets, may contain spaces; utime and stime are the 12th and 13th fields after it.
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


STEPS = 5
MOST_EXPENSIVE = 10


def traced(steps: Callable[[int], object], folder: Path, dist: DistEnv) -> list[dict[str, Any]]:
    """Write `folder`/trace-RANK.json.gz of a few steps; return the most expensive operators, or kernels on a GPU.

    Each entry has its name, calls and milliseconds per step, and its share of the total time. A step is slower under
    the profiler, especially with short operators. On a CPU the pipeline's threads are not traced.
    """
    on_gpu = dist.device.type == "cuda"
    # Otherwise Kineto prints its stages and, where there is no GPU, a meaningless error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        steps(STEPS)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"trace-{dist.rank}.json.gz"))
    return most_expensive(profiler.key_averages(), on_gpu)


def most_expensive(events: EventList, on_gpu: bool) -> list[dict[str, Any]]:
    """Return the most expensive operators by self time, without the operators that they call."""

    def microseconds(event: FunctionEventAvg) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    # On a GPU a kernel's time is also attributed to the operator that launched it, so only kernels are counted.
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    counted = [event for event in events if event.device_type == kind and not event.is_user_annotation]
    total = sum(map(microseconds, counted))
    return [
        {
            "name": re.sub(r"## Call CompiledFxGraph (\w{8})\w* ##", r"compiled graph \1", event.key),
            "calls_per_step": event.count / STEPS,
            "ms_per_step": round(microseconds(event) / STEPS / 1e3, 4),
            "share": round(microseconds(event) / total, 4),
        }
        for event in sorted(counted, key=microseconds, reverse=True)[:MOST_EXPENSIVE]
    ]

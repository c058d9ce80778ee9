"""Where a step's time goes, by torch's profiler: a trace to look at and the operators that cost most."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from iwm.training.distributed import World

STEPS = 5
MOST_EXPENSIVE = 10


def traced(steps: Callable[[int], object], folder: Path, here: World) -> list[dict[str, Any]]:
    """Write `folder`/trace-RANK.json.gz of a few steps; return the most expensive operators, or kernels on a GPU.

    Each with its name, calls and milliseconds per step, and its share of the time of all of them. A step is slower
    under the profiler, the more so the shorter its operators are; on a CPU the pipeline's threads are not seen.
    """
    on_gpu = here.device.type == "cuda"
    # Kineto would print its stages and, where there is no GPU, an error that means nothing.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        steps(STEPS)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"trace-{here.rank}.json.gz"))
    return most_expensive(profiler.key_averages(), on_gpu)


def most_expensive(events: EventList, on_gpu: bool) -> list[dict[str, Any]]:
    """By time of their own, without that of the operators they call."""

    def microseconds(event: FunctionEventAvg) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    # On a GPU a kernel's time is also booked to the operator that launched it: count kernels alone.
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

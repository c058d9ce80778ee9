"""Tables of a profiler trace of a GPU: kernels of training's stream, its idle time, and operations that start late.

python benchmarks/trace_report.py TRACE [--steps N] [--rows N]

TRACE is a file that `throughput.py --profile DIR` writes. Training's stream is the one with the most work; all others
are the pipeline's. An operation starts late if it waits for something else than its launch and the operations before it
on its stream: for free multiprocessors, or for work of another stream that shares its hardware queue.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from environment import BenchmarkError
from rich.console import Console
from timing import STEPS

from iwm.evaluation.result_table import ResultTable
from iwm.ranges import Range, check_ranges
from shards.command_line import run_command

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of Kineto for work on the GPU."""
LATE_MS = 5.0
"""Time after which an operation counts as late: longer than any kernel of a step (ms)."""
NAME_WIDTH = 90
"""Number of characters of a kernel's name that are printed."""
GAPS_US = (1.0, 2.0, 4.0, 10.0, 50.0, 300.0)
"""Upper limits of the classes of gaps (µs)."""


@dataclass(frozen=True)
class TraceOptions:
    """Tables of a profiler trace."""

    trace: Annotated[Path, tyro.conf.Positional]
    """Chrome trace, .json or .json.gz."""
    steps: Annotated[int, Range(min=1)] = STEPS
    """Number of training steps in the trace."""
    rows: Annotated[int, Range(min=1)] = 30
    """Number of kernels that are listed."""


class Operation(NamedTuple):
    """Kernel or copy on the GPU. Times are in ms from the first one."""

    name: str
    stream: int
    start: float
    end: float
    launched: float | None
    """End of its launch on the host; None where the trace has none, and for the nodes of a CUDA graph."""


def read_trace(path: Path) -> list[Operation]:
    """Return the trace's operations in the order in which they start. Raises BenchmarkError where there are none."""
    try:
        data = path.read_bytes()
        events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{path}: is not a profiler trace ({error}); make one with --profile") from error
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") == "cuda_runtime" and event["name"] != "cudaGraphLaunch"
    }
    found = [event for event in events if event.get("cat") in ON_GPU]
    if not found:
        raise BenchmarkError(f"{path}: contains no work of a GPU; make the trace on a machine with one")
    begin = min(event["ts"] for event in found)

    def end_of(event: dict[str, Any]) -> float:
        return float(event["ts"] + event["dur"] - begin) / 1e3

    def operation(event: dict[str, Any]) -> Operation:
        launch = launches.get(event["args"].get("correlation"))
        start, launched = (event["ts"] - begin) / 1e3, None if launch is None else end_of(launch)
        return Operation(event["name"], event["args"]["stream"], start, end_of(event), launched)

    return sorted(map(operation, found), key=lambda one: one.start)


def training_stream(operations: Sequence[Operation]) -> int:
    """Return the stream with the most work."""
    work = defaultdict[int, float](float)
    for one in operations:
        work[one.stream] += one.end - one.start
    return max(work, key=work.__getitem__)


def gaps(operations: Sequence[Operation]) -> list[tuple[float, Operation]]:
    """Return the idle times (ms) between operations of one stream, each with the operation that ends it."""
    found, busy_until = [], operations[0].end
    for one in operations[1:]:
        if one.start > busy_until:
            found.append((one.start - busy_until, one))
        busy_until = max(busy_until, one.end)
    return found


def late(operations: Sequence[Operation]) -> list[tuple[float, Operation]]:
    """Return the operations that start late, each with the time that it waited (ms)."""
    found, ends = [], defaultdict[int, float](float)
    for one in sorted(operations, key=lambda one: (one.stream, one.start)):
        if one.launched is not None:
            waited = one.start - max(one.launched, ends[one.stream])
            if waited > LATE_MS:
                found.append((waited, one))
        ends[one.stream] = max(ends[one.stream], one.end)
    return sorted(found, key=lambda pair: pair[1].start)


def report(options: TraceOptions, console: Console) -> None:
    """Print the tables. Raises BenchmarkError for a file that is not a trace of a GPU."""
    check_ranges(options)
    line = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    operations = read_trace(options.trace)
    stream = training_stream(operations)
    training = [one for one in operations if one.stream == stream]
    others = [one for one in operations if one.stream != stream]
    kernels = []
    by_name = defaultdict[str, list[float]](list)
    for one in training:
        by_name[one.name].append(one.end - one.start)
    for name, took in sorted(by_name.items(), key=lambda pair: -sum(pair[1]))[: options.rows]:
        ms, calls = sum(took) / options.steps, len(took) / options.steps
        kernels.append([name[:NAME_WIDTH], f"{ms:.2f}", f"{calls:g}", f"{1e3 * ms / calls:.1f}"])
    console.print(ResultTable("training's stream, per step", ["kernel", "ms", "calls", "µs each"], kernels))
    busy = sum(map(sum, by_name.values()))
    span = training[-1].end - training[0].start
    line(f"training's stream: {busy / options.steps:.2f} ms of work in {span / options.steps:.2f} ms per step")

    idle = gaps(training)
    classes = []
    for low, high in pairwise((0.0, *GAPS_US, float("inf"))):
        within = [gap for gap, _ in idle if low <= 1e3 * gap < high]
        label = f"{low:g} to {high:g}" if high < float("inf") else f"{low:g} and more"
        classes.append([label, f"{len(within) / options.steps:g}", f"{sum(within) / options.steps:.2f}"])
    columns = ["gaps, µs", "number", "ms"]
    console.print(ResultTable("idle time of training's stream, per step", columns, classes))
    for gap, one in idle:
        if 1e3 * gap >= GAPS_US[-1]:
            line(f"idle for {gap:.2f} ms until {one.start:.2f}, before {one.name[:NAME_WIDTH]}")

    work = sum(one.end - one.start for one in others) / options.steps
    line(f"other streams: {len(others) / options.steps:.0f} operations, {work:.2f} ms of work per step")
    waiting = late(others)
    line(f"of {len(others)} operations on other streams {len(waiting)} start more than {LATE_MS:g} ms late")
    for waited, one in waiting:
        line(f"{waited:.1f} ms late at {one.start:.2f}, stream {one.stream}: {one.name[:NAME_WIDTH]}")


def main() -> None:
    report(tyro.cli(TraceOptions, description=__doc__, prog="benchmarks/trace_report.py"), Console())


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/trace_report.py"))

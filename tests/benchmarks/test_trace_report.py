"""Report of a profiler trace: training's stream, its idle time, operations that start late, and files that are none."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from environment import BenchmarkError
from rich.console import Console
from trace_report import TraceOptions, gaps, late, read_trace, report, training_stream

TRAINING, DECODER = 7, 13


def on_gpu(stream: int, start: float, duration: float, number: int, name: str = "gemm") -> dict[str, Any]:
    arguments = {"stream": stream, "correlation": number}
    return {"ph": "X", "cat": "kernel", "name": name, "ts": 1000 + start, "dur": duration, "args": arguments}


def launch(end: float, number: int, name: str = "cudaLaunchKernel") -> dict[str, Any]:
    return {"ph": "X", "cat": "cuda_runtime", "name": name, "ts": 990 + end, "dur": 10, "args": {"correlation": number}}


EVENTS = [
    {"ph": "M", "name": "process_name"},
    # A graph of two kernels, 3 µs apart, and 400 µs later a third.
    launch(0, 1, "cudaGraphLaunch"),
    on_gpu(TRAINING, 0, 20_000, 1),
    on_gpu(TRAINING, 20_003, 20_000, 1, "norm"),
    launch(40_000, 2),
    on_gpu(TRAINING, 40_403, 1_000, 2, "adam"),
    # Two kernels of the decoder: the first waits for the graph, the second only for the first.
    launch(8_000, 3),
    on_gpu(DECODER, 40_010, 100, 3, "dct"),
    launch(8_010, 4),
    on_gpu(DECODER, 40_110, 100, 4, "colour"),
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace-0.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": EVENTS}).encode()))
    return file


def test_the_stream_with_most_work_is_training_and_its_gaps_are_found(trace: Path) -> None:
    operations = read_trace(trace)
    assert training_stream(operations) == TRAINING
    idle = gaps([one for one in operations if one.stream == TRAINING])
    assert [(round(gap, 3), one.name) for gap, one in idle] == [(0.003, "norm"), (0.4, "adam")]


def test_an_operation_is_late_that_waits_for_another_stream_not_for_its_own(trace: Path) -> None:
    ((waited, one),) = late(read_trace(trace))
    assert (one.name, one.stream, round(waited, 2)) == ("dct", DECODER, 32.01)


def test_the_tables_say_it_per_step(trace: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    report(TraceOptions(trace, steps=2), console)
    text = console.file.getvalue()
    assert "training's stream: 20.50 ms of work in 20.70 ms per step" in text
    assert "idle for 0.40 ms until 40.40, before adam" in text
    assert "other streams: 1 operations, 0.10 ms of work per step" in text
    assert "of 2 operations on other streams 1 start more than 5 ms late" in text
    assert "32.0 ms late at 40.01, stream 13: dct" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no trace", "is not a profiler trace"),
        (b"[]", "is not a profiler trace"),
        (json.dumps({"traceEvents": EVENTS[:2]}).encode(), "contains no work of a GPU"),
    ],
)
def test_a_file_that_is_no_trace_of_a_gpu_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "trace.json"
    file.write_bytes(content)
    with pytest.raises(BenchmarkError, match=message):
        report(TraceOptions(file), Console(quiet=True))
    with pytest.raises(BenchmarkError, match="is not a profiler trace"):
        report(TraceOptions(tmp_path / "absent.json"), Console(quiet=True))

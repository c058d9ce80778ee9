"""Profile of the two-view pipeline: time per stage, its limit (JPEG decoding) and baselines.

The real graph is truncated after each stage, and the differences are the stages' times. The first stages are built from
the pipeline's own functions. A cut between colour ops is the whole pipeline with probability 0 for the later ops, which
DALI then leaves out of its graph. Mode `all` uses short measurements; mode `data` compares loaders with care.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from loaders import LoaderWork, measured_loaders
from options import Device
from rich.console import Console
from timing import measure, percentiles

from dali_pipelines.augmentations import (
    DESTRUCTIVE_OPS,
    JITTER_FIELDS,
    JITTER_OPS,
    NO_PHOTOMETRIC,
    PhotometricConfig,
    ViewBackend,
)
from dali_pipelines.dali import pipeline_def
from dali_pipelines.decoder import Decoder
from dali_pipelines.geometry import decode_crop, draw_crop, resize_box
from dali_pipelines.pipelines import two_views
from dali_pipelines.pixels import Backend, DataNode
from dali_pipelines.reader import DataSource, open_source, read
from dali_pipelines.views import Views
from iwm.config import Config
from iwm.training.runtime import select_backend

TURNS: dict[ViewBackend, int] = {"cpu": 5, "gpu": 3, "triton": 3}
"""Number of measurements of each cut; each builds a pipeline, which takes a second or more on a GPU."""

AHEAD = 2
"""Number of batches that each cut prefetches."""

ENCODED = 256
"""Size of the shuffle buffer of each cut's reader (encoded images)."""


Build = Callable[[], Any]
"""Function that builds a DALI pipeline."""


def stage_times(
    folder: Path,
    split: str,
    views: Views,
    *,
    backend: ViewBackend = "cpu",
    threads: int = 1,
    batch: int = 64,
    seconds: float = 8.0,
) -> dict[str, dict[str, float]]:
    """Measure the milliseconds per image that each stage adds, as median, p10 and p90 over turns.

    Times are CPU time for backend `cpu`, which runs as on a machine without a GPU, and wall time for the others; their
    sum is the whole pipeline's, for `triton` without the kernels on training's stream. The measurement runs in its own
    process, pinned to as many cores as `threads`. Each pipeline is built for its turn and freed after it, because on a
    GPU each takes gigabytes; this adds to `seconds`. Stages of probability 0 in these views are left out. Work that
    both views share (planes, mean grey) is attributed to the first colour op. Raises ShardError.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads]
    work = partial(_stage_times, folder, split, views, backend, cores, batch, seconds)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work).result()


def _stage_times(
    folder: Path, split: str, views: Views, backend: ViewBackend, cores: list[int], batch: int, seconds: float
) -> dict[str, dict[str, float]]:
    os.sched_setaffinity(0, cores)
    on_gpu = backend != "cpu"
    source = open_source(folder, split, label=None, rank=0, world_size=1)
    settings = {
        "batch_size": batch,
        "num_threads": len(cores),
        "device_id": torch.cuda.current_device() if on_gpu else None,
        "seed": 0,
        "prefetch_queue_depth": AHEAD,
    }
    builds = dict(cuts(source, views, backend, settings))
    # Once as warm-up of the process, and once more to determine the length of a window.
    for _ in range(2):
        round_of_all = sum(_seconds(build, 1, on_gpu) for build in builds.values())
    turns = TURNS[backend]
    batches = max(1, round(seconds / turns / round_of_all))
    times: dict[str, list[float]] = {name: [] for name in builds}
    for _ in range(turns):
        before = 0.0
        for name, build in builds.items():
            until_here = 1000 * _seconds(build, batches, on_gpu) / (batches * batch)
            times[name].append(until_here - before)
            before = until_here
    return {name: percentiles(turns) for name, turns in times.items()}


def cuts(
    source: DataSource, views: Views, backend: ViewBackend, settings: dict[str, Any]
) -> Iterator[tuple[str, Build]]:
    """Yield stage names and pipeline builders, each one stage longer than the one before."""
    device: Backend = "cpu" if backend == "cpu" else "gpu"
    for stage in ("read", "decode", "crop and resize"):
        yield stage, partial(geometry, source, views, stage, device, **settings)
    for stage, until_here in [("parameters", views)] if backend == "triton" else colour_cuts(views):
        whole = partial(
            two_views,
            source,
            until_here,
            backend=backend,
            shuffle_buffer=min(ENCODED, source.samples),
            shuffle_seed=0,
            reader_prefetch=AHEAD,
            decoder=Decoder(),
            **settings,
        )
        yield stage, whole


@pipeline_def(enable_conditionals=True, exec_dynamic=True, enable_checkpointing=True)
def geometry(source: DataSource, views: Views, until: str, backend: Backend) -> tuple[DataNode, ...]:
    """Build the beginning of `two_views`, up to and including a stage."""
    encoded = read(source, shuffle_buffer=min(ENCODED, source.samples), seed=0, prefetch=AHEAD)
    if until == "read":
        return encoded.jpeg, encoded.source_info
    crop = draw_crop(encoded.jpeg, views.crop_scale, views.crop_ratio, views.flip_probability)
    box = decode_crop(encoded.jpeg, crop, backend, Decoder())
    if until == "decode":
        return box, encoded.source_info
    return resize_box(box, crop, views.size, backend), encoded.source_info


def colour_cuts(views: Views) -> list[tuple[str, Views]]:
    """Return views truncated after each possible colour op; the first has no op and computes only the parameters."""
    done = replace(views, target=NO_PHOTOMETRIC, source=NO_PHOTOMETRIC)
    found = [("parameters", done)]
    for name in ("target", "source"):
        for op, spec in _prefixes(views.target if name == "target" else views.source):
            done = replace(done, target=spec) if name == "target" else replace(done, source=spec)
            found.append((f"{name}: {op}", done))
    return found


def _prefixes(whole: PhotometricConfig) -> Iterator[tuple[str, PhotometricConfig]]:
    """Yield the ops of positive probability, each with the configuration up to and including it."""
    spec = whole.without_destructive()
    # The paper's in pairs, as the linear implementation applies them.
    paper = [op.name for op in JITTER_OPS if op.in_paper]
    others = [[op.name] for op in JITTER_OPS if not op.in_paper and whole.applies(op)]
    done: list[str] = []
    for part in (paper[:2], paper[2:], *others) if whole.jitter_probability > 0 else ():
        done += part
        yield ", ".join(part), spec.with_fields({name: 0.0 for name in JITTER_FIELDS if name not in done})
    for op in DESTRUCTIVE_OPS:
        if whole.probability(op) > 0:
            spec = spec.with_fields({f"{op.name}_probability": whole.probability(op)})
            yield op.name, spec


def _seconds(build: Build, batches: int, on_gpu: bool) -> float:
    """Return the time of `batches` batches of a newly built, warm pipeline: CPU time, or wall time on a GPU (seconds).

    The pipeline is freed on return.
    """
    pipeline = build()
    for _ in range(AHEAD + 1 if on_gpu else 1):
        pipeline.run()
    if on_gpu:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(batches):
            pipeline.run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = _cpu_seconds_at_rest()
    for _ in range(batches):
        pipeline.run()
    return _cpu_seconds_at_rest() - start


def _cpu_seconds_at_rest() -> float:
    """Wait until the pipeline's prefetch queue is full, and return this process's CPU time (seconds)."""
    looks_at_rest = 0
    while looks_at_rest < 2:
        time.sleep(0.005)
        looks_at_rest = looks_at_rest + 1 if _threads_wait() else 0
    return time.process_time()


def _threads_wait() -> bool:
    """Return True where every other thread of this process sleeps; a runnable thread without a core does not sleep."""
    me = str(threading.get_native_id())
    others = (task for task in Path("/proc/self/task").iterdir() if task.name != me)
    # The name, in brackets, may contain spaces; the state follows it.
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "S" for task in others)


BATCH = 64
"""Maximum batch size (images)."""
SECONDS, WINDOWS = 2.0, 4
"""Duration (seconds) and number of windows of one loader's measurement."""
STAGES_SECONDS = 4.0
"""Measured time of all stages together, without building them (seconds)."""


def pipeline_limits(config: Config, device: torch.device, threads: int, console: Console) -> dict[str, dict[str, Any]]:
    """Measure the images/s of JPEG decoding and of torchvision's loaders, per second of wall time and of CPU time.

    Each runs in its own process on as many cores as the pipeline has threads. Raises ShardError.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads]
    batch, backend = min(config.data.global_batch_size, BATCH), kind(device)
    work = LoaderWork(config.data.folder, config.data.train, config.views, batch, len(cores))
    others = measured_loaders(work, backend, ("torchvision", "decode"), console)
    limits = {}
    for name in [name for name in others if name != "dali"]:
        with console.status(f"loader alone: {name}"):
            rates = measure(others[name].stream, cores, SECONDS, WINDOWS)
        limits[name] = {
            "wall": percentiles([rate.wall for rate in rates]),
            "core": percentiles([rate.core for rate in rates]),
        }
    return limits


def pipeline_stages(
    config: Config, device: torch.device, threads: int, console: Console
) -> dict[str, dict[str, float]]:
    """Measure the milliseconds per image that each operator adds: median, p10 and p90. Raises ShardError.

    On a GPU this is wall time with training's threads, because with one thread the CPU core would be the bottleneck;
    for backend `cpu` it is CPU time on one core.
    """
    backend = select_backend(config.data.backend, device, config.views, "data.backend")
    with console.status("the pipeline's operators"):
        return stage_times(
            config.data.folder,
            config.data.train,
            config.views,
            backend=backend,
            threads=1 if backend == "cpu" else threads,
            batch=min(config.data.global_batch_size, BATCH),
            seconds=STAGES_SECONDS,
        )


def kind(device: torch.device) -> Device:
    return "cuda" if device.type == "cuda" else "cpu"

"""Where the two-view pipeline's time goes: the real graph, cut off after each stage, and what each stage adds.

The first stages are built of the pipeline's own functions; a cut between colour ops is the whole pipeline told that the
later ops cannot happen, for then DALI's graph does not hold them.
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
from typing import Any, Literal

import torch
from turns import spread

from dali_pipelines.augmentation import NO_COLOUR, Photometric, Views
from dali_pipelines.dali import pipeline_def
from dali_pipelines.decoder import GpuDecoder
from dali_pipelines.photometric import Backend, DataNode
from dali_pipelines.reader import Source, decode_box, draw_crop, open_source, read, resize_box
from dali_pipelines.views import two_views

TURNS = {"cpu": 5, "cuda": 3}
"""Measurements of each cut, in turns; a pipeline is built for each, which takes a second or more on a GPU."""

AHEAD = 2
"""Batches that each cut prepares ahead."""

ENCODED = 256
"""Encoded images that each cut's reader holds to draw from."""


Build = Callable[[], Any]
"""Builds a DALI pipeline."""


def stage_times(
    folder: Path,
    split: str,
    views: Views,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int = 1,
    batch: int = 64,
    seconds: float = 8.0,
) -> dict[str, dict[str, float]]:
    """Milliseconds per image that each stage adds, as median, p10 and p90 over turns; their sum is the pipeline's.

    On a CPU of CPU time, on a GPU by the clock. In a process apart, pinned to as many cores as `threads`. There is one
    pipeline at a time: each is built for its turn and freed after it, for on a GPU each holds gigabytes. That takes
    time, beside `seconds`. Stages that cannot happen in these views are left out. What both views share (planes, mean
    grey) counts with the first colour op. Raises ShardError.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads]
    work = partial(_stage_times, folder, split, views, device, cores, batch, seconds)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work).result()


def _stage_times(
    folder: Path, split: str, views: Views, device: str, cores: list[int], batch: int, seconds: float
) -> dict[str, dict[str, float]]:
    os.sched_setaffinity(0, cores)
    on_gpu = device == "cuda"
    source = open_source(folder, split, label=None, rank=0, world_size=1)
    settings = {
        "batch_size": batch,
        "num_threads": len(cores),
        "device_id": torch.cuda.current_device() if on_gpu else None,
        "seed": 0,
        "prefetch_queue_depth": AHEAD,
    }
    builds = dict(cuts(source, views, "gpu" if on_gpu else "cpu", settings))
    # Once for what only the first pipelines of a process do, once more to know how long a window may be.
    for _ in range(2):
        round_of_all = sum(_seconds(build, 1, on_gpu) for build in builds.values())
    turns = TURNS[device]
    batches = max(1, round(seconds / turns / round_of_all))
    times: dict[str, list[float]] = {name: [] for name in builds}
    for _ in range(turns):
        before = 0.0
        for name, build in builds.items():
            until_here = 1000 * _seconds(build, batches, on_gpu) / (batches * batch)
            times[name].append(until_here - before)
            before = until_here
    return {name: spread(turns) for name, turns in times.items()}


def cuts(source: Source, views: Views, backend: Backend, settings: dict[str, Any]) -> Iterator[tuple[str, Build]]:
    """Yield builders of the pipelines, each one stage longer than the last and named for that stage."""
    for stage in ("read", "decode", "crop and resize"):
        yield stage, partial(geometry, source, views, stage, backend, **settings)
    for stage, until_here in colour_cuts(views):
        whole = partial(
            two_views,
            source,
            until_here,
            backend=backend,
            shuffle_buffer=min(ENCODED, source.samples),
            order_seed=0,
            read_ahead=AHEAD,
            decoder=GpuDecoder(),
            **settings,
        )
        yield stage, whole


@pipeline_def(enable_conditionals=True, exec_dynamic=True, enable_checkpointing=True)
def geometry(source: Source, views: Views, until: str, backend: Backend) -> tuple[DataNode, ...]:
    """The beginning of `two_views`, up to and with a stage."""
    encoded = read(source, shuffle_buffer=min(ENCODED, source.samples), seed=0, prefetch=AHEAD)
    if until == "read":
        return encoded.jpeg, encoded.origin
    crop = draw_crop(encoded.jpeg, views.crop_scale, views.crop_ratio, views.flip_probability)
    box = decode_box(encoded.jpeg, crop, backend, GpuDecoder())
    if until == "decode":
        return box, encoded.origin
    return resize_box(box, crop, views.size, backend), encoded.origin


def colour_cuts(views: Views) -> list[tuple[str, Views]]:
    """Views whose colour ops end after each op that can happen; first none, which leaves the parameters."""
    done = replace(views, target=NO_COLOUR, source=NO_COLOUR)
    found = [("parameters", done)]
    for name in ("target", "source"):
        for op, spec in _prefixes(views.target if name == "target" else views.source):
            done = replace(done, target=spec) if name == "target" else replace(done, source=spec)
            found.append((f"{name}: {op}", done))
    return found


def _prefixes(whole: Photometric) -> Iterator[tuple[str, Photometric]]:
    """The ops that can happen, each with the ops up to it."""
    spec = whole.without_destructive()
    if whole.jitter_probability > 0:
        yield "brightness, contrast", replace(spec, saturation=0.0, hue=0.0)
        yield "saturation, hue", spec
    for op in ("grayscale", "blur", "solarize"):
        probability = f"{op}_probability"
        if getattr(whole, probability) > 0:
            spec = replace(spec, **{probability: getattr(whole, probability)})
            yield op, spec


def _seconds(build: Build, batches: int, on_gpu: bool) -> float:
    """For so many batches of a newly built pipeline, once it has made one: of CPU time, or on a GPU by the clock.

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
    """Of this process, once all batches are made that a pipeline makes ahead: as many after a window as before it."""
    looks_at_rest = 0
    while looks_at_rest < 2:
        time.sleep(0.005)
        looks_at_rest = looks_at_rest + 1 if _threads_wait() else 0
    return time.process_time()


def _threads_wait() -> bool:
    """Whether no other thread of this process wants a core: on a busy machine one may want it and not get it."""
    me = str(threading.get_native_id())
    others = (task for task in Path("/proc/self/task").iterdir() if task.name != me)
    # The name, in brackets, may hold spaces; the state follows it.
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "S" for task in others)

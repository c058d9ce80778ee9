"""Mode `data`: throughput of the two-view DALI pipeline, of baseline loaders, and of JPEG decoding as the limit."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from baselines import jpeg_decode, torchvision_loader
from environment import BenchmarkError
from loader_rates import LoaderSetup, batches
from options import Baseline, LoaderOptions, chosen_views, settings_of
from rich.console import Console
from synthetic_data import GENERATED, generated_shards
from timing import Rate, Stream, measure, paired_ratio, percentiles, ratio_text

from dali_pipelines.views import Views
from iwm.config import PipelineBackend
from iwm.evaluation.result_table import ResultTable
from iwm.ranges import check_ranges
from iwm.training.runtime import select_backend, select_device
from shards.format import MANIFEST, load_manifest


def run(options: LoaderOptions, console: Console) -> dict[str, Any]:
    """Measure, print a table per clock, and return the results. Raises BenchmarkError, ConfigError and ShardError."""
    check_ranges(options)
    views = chosen_views(options.recipe, options.scenario, options.size, options.colour)
    baselines = chosen_baselines(options, console)
    folder = options.shards or generated_shards(console)
    samples = load_manifest(folder, options.split).samples
    if samples < options.batch_size:
        raise BenchmarkError(
            f"--batch-size {options.batch_size}: {folder} has only {samples} images in '{options.split}'; "
            f"choose at most {samples}"
        )
    available = sorted(os.sched_getaffinity(0))
    if options.cores > len(available):
        raise BenchmarkError(f"--cores {options.cores}: this process may use {len(available)}; lower --cores")
    backend = select_backend(options.backend, select_device(options.device, "--device"), views, "--backend")
    work = LoaderWork(folder, options.split, views, options.batch_size, options.cores)
    contenders = measured_loaders(work, options.device, baselines, console, backend)
    turns: dict[str, list[list[Rate]]] = {name: [] for name in contenders}
    for turn in range(options.repeats):
        for name, contender in contenders.items():
            with console.status(f"turn {turn + 1} of {options.repeats}: {name}"):
                turns[name].append(measure(contender.stream, available[: options.cores], options.seconds, WINDOWS))
    rivals = [name for name, contender in contenders.items() if contender.same_work and name != "dali"]
    result = {
        "views": asdict(views),
        "settings": settings_of(options),
        "shards": str(folder),
        "images_per_second": {
            clock: {
                name: percentiles([getattr(rate, clock) for turn in turns[name] for rate in turn]) for name in turns
            }
            for clock in CLOCKS
        },
        "dali_over": {clock: over_each(turns, clock) for clock in CLOCKS},
        "fastest_rival": {clock: fastest(turns, rivals, clock) if rivals else None for clock in CLOCKS},
    }
    show(result, options, console)
    return result


WINDOWS = 5
"""Number of windows per turn, over which percentiles are taken."""
CLOCKS = {"wall": "images per second of wall time", "core": "images per second of CPU time"}
"""Titles of the two rates of timing.Rate."""


def chosen_baselines(options: LoaderOptions, console: Console) -> tuple[Baseline, ...]:
    """Return the baselines in the order of BASELINES. `all` leaves out and reports those that are not installed.

    Raises BenchmarkError where `none` is combined with others.
    """
    names = options.baseline
    if "none" in names and len(names) > 1:
        raise BenchmarkError(f"--baseline {' '.join(names)}: 'none' cannot be combined with others")
    if "all" not in names:
        return tuple(name for name in BASELINES if name in names)
    for name in BASELINES:
        if not installed(name):
            console.print(f"without {name}: {how_to_install(name)}")
    return tuple(name for name in BASELINES if installed(name))


Turns = dict[str, list[list[Rate]]]
"""Rates of each loader by turn and window."""


def over_each(turns: Turns, clock: str) -> dict[str, dict[str, float]]:
    """Return the ratio of DALI's rate to that of every other loader."""
    ours = medians(turns["dali"], clock)
    return {name: paired_ratio(ours, medians(theirs, clock)) for name, theirs in turns.items() if name != "dali"}


def fastest(turns: Turns, names: list[str], clock: str) -> str:
    """Return the loader with the highest median rate by a clock."""
    return max(names, key=lambda name: float(np.median(medians(turns[name], clock))))


def medians(turns: list[list[Rate]], clock: str) -> list[float]:
    return [float(np.median([getattr(rate, clock) for rate in turn])) for turn in turns]


def show(result: dict[str, Any], options: LoaderOptions, console: Console) -> None:
    for clock, meaning in CLOCKS.items():
        rows = []
        for name, rate in result["images_per_second"][clock].items():
            cells = (f"{rate[column]:.0f}" for column in ("median", "p10", "p90"))
            rows.append([name, *cells, ratio_text(result["dali_over"][clock].get(name))])
        title = f"two views of {result['views']['size']} px on {options.device}, {options.cores} core(s): {meaning}"
        columns = ["", "median", "p10", "p90", f"dali / this ({options.repeats} turns)"]
        console.print(ResultTable(title, columns, rows))
        if rival := result["fastest_rival"][clock]:
            times = result["dali_over"][clock][rival]["median"]
            console.print(f"dali is {times:.2f} times as fast as {rival}, the fastest loader that does the same work")
        if limit := result["dali_over"][clock].get(DECODE):
            console.print(f"dali reaches {limit['median']:.2f} of {DECODE}, the limit")


DECODE = "JPEG decode alone"
"""Name of JPEG decoding alone in tables and results."""


class LoaderWork(NamedTuple):
    """Data, views and batch size of a measurement, the same for all loaders."""

    folder: Path
    split: str
    views: Views
    batch_size: int
    cores: int
    """Number of worker threads or processes."""


class MeasuredLoader(NamedTuple):
    """One loader that is measured."""

    stream: Stream
    same_work: bool
    """True where it makes both complete views, so that its rate is comparable with DALI's."""


def measured_loaders(
    work: LoaderWork,
    device: str,
    baselines: tuple[Baseline, ...],
    console: Console,
    backend: PipelineBackend = "auto",
) -> dict[str, MeasuredLoader]:
    """Return the loaders by name, `dali` first. Raises BenchmarkError where a baseline is not installed.

    backend: of DALI's pipeline.
    """
    setup = LoaderSetup(work.folder, work.split, work.views, work.batch_size, torch.device(device), work.cores)
    chosen = {"dali": MeasuredLoader(partial(batches, setup, {"backend": backend}), True)}
    for baseline in baselines:
        if not installed(baseline):
            raise BenchmarkError(f"--baseline {baseline}: {how_to_install(baseline)}")
        chosen.update(BASELINES[baseline](work, console))
    return chosen


INSTALL: dict[Baseline, str] = {
    "webdataset": "'pip install webdataset'",
    "ffcv": "it is built from source: pkg-config, libopencv-dev and libturbojpeg0-dev (Debian's names), then "
    "'pip install ffcv'",
}
"""Installation of the baselines that are not dependencies of the benchmarks; each package has the baseline's name."""


def installed(baseline: Baseline) -> bool:
    return baseline not in INSTALL or find_spec(baseline) is not None


def how_to_install(baseline: Baseline) -> str:
    return f"the package {baseline} is not installed here ({INSTALL[baseline]})"


def _torchvision(work: LoaderWork, console: Console) -> dict[str, MeasuredLoader]:
    folder, split, views, batch, cores = work
    variants: tuple[torchvision_loader.Variant, ...] = ("pil", "tensor")
    return {
        f"torchvision {variant}": MeasuredLoader(
            partial(torchvision_loader.batches, folder, split, views, variant, batch, cores), True
        )
        for variant in variants
    }


def _webdataset(work: LoaderWork, console: Console) -> dict[str, MeasuredLoader]:
    loader = importlib.import_module("baselines.webdataset_loader")
    return {"webdataset": MeasuredLoader(partial(loader.batches, *work), True)}


def _ffcv(work: LoaderWork, console: Console) -> dict[str, MeasuredLoader]:
    loader = importlib.import_module("baselines.ffcv_loader")
    shards = f"{work.split} of {(work.folder / MANIFEST).read_text()}"
    file = GENERATED / f"ffcv-{hashlib.sha256(shards.encode()).hexdigest()[:16]}.beton"
    if not file.exists():
        console.print(f"writing the same JPEGs as an FFCV dataset to {file}")
        loader.write_dataset(work.folder, work.split, file, work.cores)
    # FFCV lacks only some colour ops: where the views use none, it does the same work.
    whole = all(
        spec.jitter_probability == 0 and not spec.destructive for spec in (work.views.source, work.views.target)
    )
    stream = partial(loader.batches, file, work.views, work.batch_size, work.cores)
    return {"ffcv" if whole else "ffcv, part of the jitter": MeasuredLoader(stream, whole)}


def _decode(work: LoaderWork, console: Console) -> dict[str, MeasuredLoader]:
    return {
        DECODE: MeasuredLoader(
            partial(jpeg_decode.batches, work.folder, work.split, work.batch_size, work.cores), False
        )
    }


BASELINES: dict[Baseline, Callable[[LoaderWork, Console], dict[str, MeasuredLoader]]] = {
    "torchvision": _torchvision,
    "webdataset": _webdataset,
    "ffcv": _ffcv,
    "decode": _decode,
}

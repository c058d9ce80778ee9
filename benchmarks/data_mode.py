"""Mode `data`: images per second of the two-view pipeline alone, against others doing the same work."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from data_contenders import BASELINES, DECODE, Baseline, Device, Work, entrants, how_to_install, installed
from generated import generated_shards
from mistakes import BenchmarkError, named
from pinned import Rate, measure
from rich.console import Console
from rich.table import Table
from turns import ratio, spread

from dali_pipelines.augmentation import SCENARIOS, ColourDefinition, Views
from iwm.recipes import RECIPES
from shards.manifest import load_manifest


@dataclass(frozen=True)
class Data:
    """Images per second of the data pipeline alone.

    Contenders take turns, each in a process of its own, on equal cores and the same JPEGs.
    """

    recipe: str | None = None
    """Recipe whose views are made (iwm/recipes.py); None: the paper's, A.1."""
    scenario: str | None = None
    """Row of table S2 in place of the recipe's colours."""
    size: int | None = None
    """Side of the views in pixels, in place of the recipe's."""
    colour: ColourDefinition | None = None
    """Definition of the colour jitter, in place of the recipe's."""
    shards: Path | None = None
    """Folder of shards; None: 1,200 JPEGs of 500×375 cut from scikit-image's photographs, made in data/benchmark."""
    split: str = "train"
    """Split of the shards."""
    baseline: tuple[Literal[Baseline, "all", "none"], ...] = ("torchvision",)
    """One or several. `torchvision`: DataLoader and transforms v2, on Pillow images and on tensors. `webdataset`: its
    package's own loader with the same transforms. `ffcv`: without hue, grayscale, blur and solarize, which it lacks.
    `decode`: JPEG decode and nothing else, the limit. `all`: those that are installed."""
    device: Device = "cpu"
    """Where the DALI pipeline works; baselines work on the CPU."""
    cores: int = 1
    """CPU cores that each contender is pinned to, and its worker threads or processes."""
    batch: int = 64
    """Images."""
    seconds: float = 10.0
    """Length of one measurement, its warm-up of a fifth more not counted."""
    repeats: int = 3
    """Turns of each contender."""
    json: Path | None = None
    """File to write everything to."""


def run(options: Data, console: Console) -> dict[str, Any]:
    """Measure and print a table per clock. Raises BenchmarkError and ShardError."""
    views = chosen_views(options)
    baselines = chosen_baselines(options, console)
    folder = options.shards or generated_shards(console)
    samples = load_manifest(folder, options.split).samples
    if samples < options.batch:
        raise BenchmarkError(f"--batch {options.batch}: {folder} has only {samples} images in '{options.split}'")
    available = sorted(os.sched_getaffinity(0))
    if options.cores > len(available):
        raise BenchmarkError(f"--cores {options.cores}: this process may use {len(available)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: this machine has no usable GPU; say --device cpu")
    work = Work(folder, options.split, views, options.batch, options.cores)
    contenders = entrants(work, options.device, baselines, console)
    turns: dict[str, list[list[Rate]]] = {name: [] for name in contenders}
    for turn in range(options.repeats):
        for name, contender in contenders.items():
            with console.status(f"turn {turn + 1} of {options.repeats}: {name}"):
                turns[name].append(measure(contender.stream, available[: options.cores], options.seconds, WINDOWS))
    rivals = [name for name, contender in contenders.items() if contender.same_work and name != "dali"]
    result = {
        "views": asdict(views),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "shards": str(folder),
        "images_per_second": {
            clock: {name: spread([getattr(rate, clock) for turn in turns[name] for rate in turn]) for name in turns}
            for clock in CLOCKS
        },
        "dali_over": {clock: over_each(turns, clock) for clock in CLOCKS},
        "fastest_rival": {clock: fastest(turns, rivals, clock) if rivals else None for clock in CLOCKS},
    }
    show(result, options, console)
    return result


WINDOWS = 5
"""Stretches that a turn is divided into, for the percentiles."""
CLOCKS = {"wall": "images/s by the clock", "core": "images per second of CPU time"}
"""The two rates of pinned.Rate, and what they are called."""


def chosen_views(options: Data) -> Views:
    """The recipe's views with what the options put in their place."""
    views = named("--recipe", options.recipe, RECIPES)().views if options.recipe else Views()
    if options.scenario:
        row = named("--scenario", options.scenario, SCENARIOS)
        views = replace(views, source=row.source, target=row.target)
    return replace(views, size=options.size or views.size, colour=options.colour or views.colour)


def chosen_baselines(options: Data, console: Console) -> tuple[Baseline, ...]:
    """Baselines in the order of BASELINES. `all` leaves out what is not installed, and says so."""
    names = options.baseline
    if "none" in names and len(names) > 1:
        raise BenchmarkError(f"--baseline {' '.join(names)}: 'none' stands alone")
    if "all" not in names:
        return tuple(name for name in BASELINES if name in names)
    for name in BASELINES:
        if not installed(name):
            console.print(f"without {name}: {how_to_install(name)}")
    return tuple(name for name in BASELINES if installed(name))


Turns = dict[str, list[list[Rate]]]
"""Rates of each contender's turns, each of WINDOWS stretches."""


def over_each(turns: Turns, clock: str) -> dict[str, dict[str, float]]:
    """DALI over every other contender."""
    ours = medians(turns["dali"], clock)
    return {name: ratio(ours, medians(theirs, clock)) for name, theirs in turns.items() if name != "dali"}


def fastest(turns: Turns, names: list[str], clock: str) -> str:
    """Which of these contenders is fastest by a clock."""
    return max(names, key=lambda name: float(np.median(medians(turns[name], clock))))


def medians(turns: list[list[Rate]], clock: str) -> list[float]:
    return [float(np.median([getattr(rate, clock) for rate in turn])) for turn in turns]


def show(result: dict[str, Any], options: Data, console: Console) -> None:
    for clock, meaning in CLOCKS.items():
        table = Table(
            title=f"two views of {result['views']['size']} px on {options.device}, {options.cores} core(s): {meaning}"
        )
        table.add_column("")
        for column in ("median", "p10", "p90", "dali / this", f"over {options.repeats} turns"):
            table.add_column(column, justify="right")
        for name, rate in result["images_per_second"][clock].items():
            cells = [f"{rate[column]:.0f}" for column in ("median", "p10", "p90")]
            if against := result["dali_over"][clock].get(name):
                cells += [f"{against['median']:.2f}", f"{against['lowest']:.2f}–{against['highest']:.2f}"]
            table.add_row(name, *cells)
        console.print(table)
        if rival := result["fastest_rival"][clock]:
            times = result["dali_over"][clock][rival]["median"]
            console.print(f"dali is {times:.2f} times {rival}, the fastest that does the same work")
        if limit := result["dali_over"][clock].get(DECODE):
            console.print(f"dali reaches {limit['median']:.2f} of {DECODE}, the limit")

"""Mode `data`: images per second of the two-view pipeline alone, against torchvision doing the same work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from baselines import torchvision_loader
from generated import generated_shards
from mistakes import BenchmarkError
from pinned import Rate, Stream, measure, summary
from rich.console import Console
from rich.table import Table

from dali_pipelines.augmentation import SCENARIOS, ColourDefinition, Views
from dali_pipelines.loader import ViewLoader
from iwm.recipes import RECIPES
from shards.manifest import load_manifest


@dataclass(frozen=True)
class Data:
    """Images per second of the data pipeline alone.

    Contenders take turns, each in a process of its own, on equal cores.
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
    baseline: Literal["torchvision", "none"] = "torchvision"
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the DALI pipeline works; the baseline works on the CPU."""
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
    """Measure and print a table. Raises BenchmarkError and ShardError."""
    views = chosen_views(options)
    folder = options.shards or generated_shards(Path("data/benchmark"), console)
    samples = load_manifest(folder, options.split).samples
    if samples < options.batch:
        raise BenchmarkError(f"--batch {options.batch}: {folder} has only {samples} images in '{options.split}'")
    available = sorted(os.sched_getaffinity(0))
    if options.cores > len(available):
        raise BenchmarkError(f"--cores {options.cores}: this process may use {len(available)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: this machine has no usable GPU; say --device cpu")
    contenders: dict[str, Stream] = {"dali": partial(dali_batches, options, folder, views)}
    for variant in ("pil", "tensor") if options.baseline == "torchvision" else ():
        contenders[f"torchvision {variant}"] = partial(
            torchvision_loader.batches, folder, options.split, views, variant, options.batch, options.cores
        )
    turns: dict[str, list[list[Rate]]] = {name: [] for name in contenders}
    for turn in range(options.repeats):
        for name, stream in contenders.items():
            with console.status(f"turn {turn + 1} of {options.repeats}: {name}"):
                turns[name].append(measure(stream, available[: options.cores], options.seconds, WINDOWS))
    result = {
        "mode": "data",
        "views": asdict(views),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "shards": str(folder),
        "images_per_second": {
            clock: {name: summary([getattr(rate, clock) for turn in turns[name] for rate in turn]) for name in turns}
            for clock in CLOCKS
        },
        "ratio": {clock: ratio(turns, clock) for clock in CLOCKS} if len(turns) > 1 else None,
    }
    show(result, options, console)
    return result


WINDOWS = 5
"""Stretches that a turn is divided into, for the percentiles."""
CLOCKS = {"wall": "images/s by the clock", "core": "images per second of CPU time"}
"""The two rates of pinned.Rate, and what they are called."""


def chosen_views(options: Data) -> Views:
    """The recipe's views with what the options put in their place."""
    for name, value, table in (("recipe", options.recipe, RECIPES), ("scenario", options.scenario, SCENARIOS)):
        if value is not None and value not in table:
            raise BenchmarkError(f"--{name} {value}: there is none of that name; there are {', '.join(table)}")
    views = RECIPES[options.recipe]().views if options.recipe else Views()
    if options.scenario:
        views = replace(views, source=SCENARIOS[options.scenario].source, target=SCENARIOS[options.scenario].target)
    return replace(views, size=options.size or views.size, colour=options.colour or views.colour)


def dali_batches(options: Data, folder: Path, views: Views) -> Iterator[int]:
    """Endless: the number of images of each batch, once it is there."""
    loader = ViewLoader(
        folder,
        options.split,
        views,
        batch_size=options.batch,
        seed=0,
        device=options.device,
        threads=options.cores,
    )
    for batch in loader:
        if options.device == "cuda":
            torch.cuda.synchronize()
        yield len(batch.source)


def ratio(turns: dict[str, list[list[Rate]]], clock: str) -> dict[str, Any]:
    """DALI over the faster baseline, turn by turn: what slows a whole turn down slows both."""
    medians = {name: [float(np.median([getattr(r, clock) for r in turn])) for turn in turns[name]] for name in turns}
    opponent = max((name for name in turns if name != "dali"), key=lambda name: float(np.median(medians[name])))
    ratios = [round(ours / theirs, 3) for ours, theirs in zip(medians["dali"], medians[opponent], strict=True)]
    return {"over": opponent, "median": float(np.median(ratios)), "lowest": min(ratios), "highest": max(ratios)}


def show(result: dict[str, Any], options: Data, console: Console) -> None:
    for clock, meaning in CLOCKS.items():
        table = Table(
            title=f"two views of {result['views']['size']} px on {options.device}, {options.cores} core(s): {meaning}"
        )
        table.add_column("")
        for column in ("median", "p10", "p90"):
            table.add_column(column, justify="right")
        for name, rate in result["images_per_second"][clock].items():
            table.add_row(name, *(f"{rate[column]:.0f}" for column in ("median", "p10", "p90")))
        console.print(table)
        if result["ratio"] is not None:
            against = result["ratio"][clock]
            console.print(
                f"dali / {against['over']}: {against['median']:.2f} "
                f"({against['lowest']:.2f} to {against['highest']:.2f} over {options.repeats} turns)"
            )

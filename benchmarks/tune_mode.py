"""Mode `tune`: a short sweep over the pipeline's settings, one after the other, written to a file that training reads.

Settings change the speed and nothing else. Each setting's candidates take turns; the first of them in the order of
preference that keeps up with the fastest is kept, and the next setting is swept with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from baselines.stored import places
from generated import generated_shards
from mistakes import BenchmarkError, make_room_for, named
from rich.console import Console
from rich.table import Table
from simplejpeg import decode_jpeg_header

from dali_pipelines.augmentation import Views
from dali_pipelines.decoder import GpuDecoder
from dali_pipelines.loader import ViewLoader
from iwm.recipes import RECIPES, with_scenario
from iwm.training.tuned import SETTINGS, Tuned, this_machine, write_tuned
from shards.manifest import load_manifest
from shards.pool import available_cores


@dataclass(frozen=True)
class Tune:
    """Find the pipeline's settings for this machine and write them to a file for `iwm/train.py RECIPE --tuned FILE`.

    The machine should do nothing else meanwhile.
    """

    recipe: str | None = None
    """Recipe whose views and batch are used (iwm/recipes.py); None: the paper's, A.1."""
    scenario: str | None = None
    """Row of table S2 in place of the recipe's colours."""
    shards: Path | None = None
    """Folder of shards. None: the recipe's; without a recipe, generated ones as in mode `data`."""
    split: str = "train"
    """Split of the shards."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the pipeline works."""
    batch: int | None = None
    """Images of one process at once. None: the recipe's share of a process, at most 256 (64 on a CPU)."""
    processes: int = 1
    """Training processes that will share this machine's cores (one per GPU)."""
    seconds: float = 1.0
    """Length of one measurement."""
    repeats: int = 5
    """Turns of each candidate."""
    out: Path = Path("tuned.yaml")
    """File to write."""
    json: Path | None = None
    """File to write everything measured to."""


class Sweep(NamedTuple):
    """One setting's candidates, in the order of preference."""

    setting: str
    candidates: Sequence[int | float]
    paced: bool = False
    """Whether the consumer stays away, between two batches, for as long as a batch takes to make: as training does."""


def run(options: Tune, console: Console) -> dict[str, Any]:
    """Measure, print a table per setting, write the file. Raises BenchmarkError and ShardError."""
    make_room_for("--out", options.out)
    work = chosen_work(options, console)
    chosen: dict[str, int | float] = {}
    if work.device.type == "cuda":
        width, height = largest_sides(work.folder, options.split)
        chosen |= {"decoder_width_hint": width, "decoder_height_hint": height}
    sweeps: list[dict[str, Any]] = []
    for sweep in sweeps_for(work.device, work.cores):
        rates = measured(work, sweep, chosen, options, console)
        value, why = choose(rates)
        chosen[sweep.setting] = value
        sweeps.append({"setting": sweep.setting, "images_per_second": by_name(rates), "chosen": value, "why": why})
        show(sweep, rates, value, why, console)
    settings = {name: chosen[name] for name in SETTINGS if name in chosen}
    tuned = Tuned(options.out, settings, this_machine(work.device, options.processes))
    write_tuned(tuned)
    console.print(f"written to {options.out}: " + ", ".join(f"data.{name} {value}" for name, value in settings.items()))
    return {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "shards": str(work.folder),
        "batch": work.batch,
        "sweeps": sweeps,
        "data": settings,
        "made_on": asdict(tuned.made_on),
    }


class Work(NamedTuple):
    """What every candidate does."""

    folder: Path
    views: Views
    batch: int
    device: torch.device
    cores: int
    """For one process."""


def chosen_work(options: Tune, console: Console) -> Work:
    """Raises BenchmarkError for options that contradict each other or the machine."""
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise BenchmarkError("--device cuda: this machine has no usable GPU; say --device cpu")
    device = torch.device("cuda" if options.device != "cpu" and available else "cpu")
    config = named("--recipe", options.recipe, RECIPES)() if options.recipe else RECIPES["iwm_b16_equi_18x384"]()
    if options.scenario:
        config = with_scenario(config, options.scenario)
    own = config.data.shards if options.recipe else None
    folder = options.shards or own or generated_shards(console)
    share = min(config.data.micro_batch or config.data.batch, config.data.batch // options.processes)
    batch = options.batch or max(1, min(share, 256 if device.type == "cuda" else 64))
    samples = load_manifest(folder, options.split).samples
    if samples < batch:
        raise BenchmarkError(f"--batch {batch}: {folder} has only {samples} images in '{options.split}'")
    return Work(folder, config.views, batch, device, max(1, available_cores() // options.processes))


def sweeps_for(device: torch.device, cores: int) -> list[Sweep]:
    """In the order in which they are made: the setting that matters most comes first."""
    threads = sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})
    decoder = [Sweep("hw_decoder_load", (0.65, 0.5, 0.8, 1.0, 0.0))] if device.type == "cuda" else []
    return [Sweep("threads", threads), *decoder, Sweep("prefetch", (1, 2, 3, 4), paced=True)]


def measured(
    work: Work, sweep: Sweep, chosen: dict[str, int | float], options: Tune, console: Console
) -> dict[int | float, list[float]]:
    """Images/s of each candidate, a value per turn; all turns with the settings `chosen` so far."""
    streams = {value: batches(work, options.split, chosen | {sweep.setting: value}) for value in sweep.candidates}
    rates: dict[int | float, list[float]] = {value: [] for value in sweep.candidates}
    pause = 0.0
    if sweep.paced:
        first = next(iter(streams.values()))
        pause = work.batch / rate(first, options.seconds, 0.0)
    for turn in range(options.repeats):
        for value, stream in streams.items():
            with console.status(f"turn {turn + 1} of {options.repeats}: {sweep.setting} {value}"):
                rates[value].append(rate(stream, options.seconds, pause))
    return rates


def batches(work: Work, split: str, settings: dict[str, int | float]) -> Iterator[int]:
    """Endless: the number of images of each batch, once it is there. The names of `settings` are those of SETTINGS."""
    decoder = GpuDecoder(
        hw_load=settings.get("hw_decoder_load", GpuDecoder.hw_load),
        width_hint=int(settings.get("decoder_width_hint", GpuDecoder.width_hint)),
        height_hint=int(settings.get("decoder_height_hint", GpuDecoder.height_hint)),
    )
    loader = ViewLoader(
        work.folder,
        split,
        work.views,
        batch_size=work.batch,
        seed=0,
        device=work.device,
        threads=int(settings["threads"]),
        prefetch=int(settings.get("prefetch", 2)),
        decoder=decoder,
    )
    for batch in loader:
        if work.device.type == "cuda":
            torch.cuda.synchronize(work.device)
        yield len(batch.source)


SETTLING = 6
"""Batches before each measurement: what was made while others were measured must not count."""


def rate(stream: Iterator[int], seconds: float, pause: float) -> float:
    """Images/s by the clock, with `pause` seconds between batches."""
    for _ in range(SETTLING):
        next(stream)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        time.sleep(pause)
        images += next(stream)
    return images / (time.perf_counter() - start)


TIE = 0.02
"""Two candidates that differ by less are as fast as each other."""


def choose(rates: dict[int | float, list[float]]) -> tuple[int | float, str]:
    """The first candidate that keeps up with the fastest, and why.

    It keeps up if it is as fast in a quarter of the turns: what slows a turn down slows both, so that one which is
    really slower is slower in nearly all.
    """
    fastest = max(rates, key=lambda value: float(np.median(rates[value])))

    def share(value: int | float, percentile: float) -> float:
        return float(np.percentile(np.divide(rates[value], rates[fastest]), percentile))

    value = next(value for value in rates if share(value, 75) >= 1 - TIE)
    if value == fastest:
        return value, f"{value} is the fastest, and none before it keeps up"
    return value, f"{fastest} is the fastest; {value} keeps up, at {share(value, 50):.2f} of its speed in the median"


def largest_sides(folder: Path, split: str, images: int = 2000) -> tuple[int, int]:
    """Width and height in pixels that no image exceeds, of so many images spread over the split; read from headers."""
    stored = places(folder, split)
    width = height = 0
    for image in stored[:: max(1, len(stored) // images)]:
        tall, wide, *_ = decode_jpeg_header(image.read())
        width, height = max(width, wide), max(height, tall)
    return width, height


def by_name(rates: dict[int | float, list[float]]) -> dict[str, list[float]]:
    return {str(value): [round(rate, 1) for rate in turns] for value, turns in rates.items()}


def show(sweep: Sweep, rates: dict[int | float, list[float]], value: int | float, why: str, console: Console) -> None:
    paced = " with a consumer as slow as the pipeline" if sweep.paced else ""
    table = Table(title=f"data.{sweep.setting}: images/s{paced}")
    table.add_column("")
    for column in ("median", "lowest", "highest"):
        table.add_column(column, justify="right")
    for candidate, turns in rates.items():
        chosen = "← " if candidate == value else "  "
        table.add_row(f"{chosen}{candidate}", *(f"{f(turns):.0f}" for f in (np.median, min, max)))
    console.print(table)
    console.print(why)

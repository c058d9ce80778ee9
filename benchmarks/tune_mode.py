"""Mode `tune`: a short sweep over the pipeline's settings, one after the other, written to a file that training reads.

Settings change the speed and nothing else. Each setting's candidates take turns; one of them is kept
(benchmarks/tune_choice.py), and the next setting is swept with it. A candidate's pipeline is built for each turn and
freed after it, so that never two of them share the cores and the GPU's memory; a turn is counted once it has settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from generated import generated_shards
from mistakes import BenchmarkError, make_room_for, named
from model_rate import model_rate
from rich.console import Console
from rich.table import Table
from tune_candidates import LoaderSetup, Settings, rate, usual_sides
from tune_choice import Rates, choose, choose_share, enough

from iwm.recipes import RECIPES, with_scenario
from iwm.training.distributed import loader_threads
from iwm.training.tuned import SETTINGS, Tuned, this_machine, write_tuned
from shards.manifest import load_manifest

PAPER = "iwm_b16_equi_18x384"
"""Recipe where the user names none."""

SHARE = "hw_decoder_load"


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
    model_rate: float | None = None
    """On a GPU: images/s that one process trains, which the decoder's share is chosen for; None: measured."""
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
    model = None
    if work.device.type == "cuda":
        width, height = usual_sides(work.folder, work.split)
        chosen |= {"decoder_width_hint": width, "decoder_height_hint": height}
        model = options.model_rate or model_rate(options.recipe or PAPER, work, console)
    sweeps: list[dict[str, Any]] = []
    for sweep in sweeps_for(work.device, work.cores):
        if sweep.setting == SHARE and model is not None:
            rates, value, why = decoder_share(work, sweep, chosen, model, options, console)
        else:
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
        "model_rate": model,
        "sweeps": sweeps,
        "data": settings,
        "made_on": asdict(tuned.made_on),
    }


def chosen_work(options: Tune, console: Console) -> LoaderSetup:
    """Raises BenchmarkError for options that contradict each other or the machine."""
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise BenchmarkError("--device cuda: this machine has no usable GPU; say --device cpu")
    device = torch.device("cuda" if options.device != "cpu" and available else "cpu")
    config = named("--recipe", options.recipe, RECIPES)() if options.recipe else RECIPES[PAPER]()
    if options.scenario:
        config = with_scenario(config, options.scenario)
    own = config.data.shards if options.recipe else None
    folder = options.shards or own or generated_shards(console)
    share = min(config.data.micro_batch or config.data.batch, config.data.batch // options.processes)
    batch = options.batch or max(1, min(share, 256 if device.type == "cuda" else 64))
    samples = load_manifest(folder, options.split).samples
    if samples < batch:
        raise BenchmarkError(f"--batch {batch}: {folder} has only {samples} images in '{options.split}'")
    return LoaderSetup(folder, options.split, config.views, batch, device, loader_threads(device, options.processes))


def sweeps_for(device: torch.device, cores: int) -> list[Sweep]:
    """In the order in which they are made: on a GPU the decoder's share first: it says what is left for threads."""
    threads = sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})
    decoder = [Sweep(SHARE, (1.0, 0.8, 0.65, 0.5, 0.0))] if device.type == "cuda" else []
    return [*decoder, Sweep("threads", threads), Sweep("prefetch", (1, 2, 3, 4), paced=True)]


def measured(
    work: LoaderSetup, sweep: Sweep, chosen: Settings, options: Tune, console: Console
) -> dict[int | float, list[float]]:
    """Images/s of each candidate, a value per turn; all turns with the settings `chosen` so far."""
    rates: dict[int | float, list[float]] = {value: [] for value in sweep.candidates}
    pause = 0.0
    if sweep.paced:
        pause = work.batch / rate(work, {**chosen, sweep.setting: sweep.candidates[0]}, options.seconds, 0.0)
    for turn in range(options.repeats):
        for value, turns in rates.items():
            with console.status(f"turn {turn + 1} of {options.repeats}: {sweep.setting} {value}"):
                turns.append(rate(work, {**chosen, sweep.setting: value}, options.seconds, pause))
    return rates


def decoder_share(
    work: LoaderSetup, sweep: Sweep, chosen: Settings, model: float, options: Tune, console: Console
) -> tuple[Rates, int | float, str]:
    """Rates, the share that is kept, and why. The first candidate is tried alone; the others only if it is too slow."""
    rates = measured(work, sweep._replace(candidates=sweep.candidates[:1]), chosen, options, console)
    if not enough(rates, model):
        rates = measured(work, sweep, chosen, options, console)
    return rates, *choose_share(rates, model)


def by_name(rates: Rates) -> dict[str, list[float]]:
    return {str(value): [round(rate, 1) for rate in turns] for value, turns in rates.items()}


def show(sweep: Sweep, rates: Rates, value: int | float, why: str, console: Console) -> None:
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

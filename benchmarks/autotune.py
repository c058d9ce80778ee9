"""Mode `tune`: compare the pipeline's implementations and settings, and print the best as options for training.

They affect speed only. On a GPU, training is measured with each implementation (backend and decoder) in turns, because
a pipeline that is fast alone may slow the model down. The settings of the chosen one are then swept one after another
with the pipeline alone: the candidates of a setting are measured in turns, one is chosen, and the next setting is swept
with it. A candidate's pipeline is built for each turn and freed after it, so that two pipelines never share the cores
and the GPU's memory. A turn is measured after the pipeline has settled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from environment import BenchmarkError, lookup
from loader_rates import (
    LoaderSettings,
    LoaderSetup,
    decoder_size_hint,
    rate,
    training_rates,
)
from options import GPU_RECIPE, TuneOptions, settings_of
from rich.console import Console
from synthetic_data import generated_shards
from timing import release_memory

from iwm.evaluation.result_table import ResultTable
from iwm.ranges import ConfigError, check_ranges
from iwm.recipes import RECIPES, with_scenario
from iwm.training.distributed import loader_threads
from iwm.training.runtime import select_backend, select_device
from shards.format import load_manifest

ENGINE_SHARE = 0.65
"""Share of the images that the JPEG engine decodes in the candidates that use it: DALI's default."""


class SettingSweep(NamedTuple):
    """One setting and its candidates, in order of preference."""

    setting: str
    candidates: Sequence[int]
    paced: bool = False
    """True where the consumer pauses between batches for as long as a batch takes to make, as training does."""


def run(options: TuneOptions, console: Console) -> dict[str, Any]:
    """Measure, print a table per setting and the options, and return the results.

    Raises BenchmarkError, ConfigError and ShardError.
    """
    check_ranges(options)
    work, recipe = loader_setup(options, console), options.recipe or GPU_RECIPE
    training: dict[str, list[float]] = {}
    chosen: dict[str, Any] = {}
    if work.device.type == "cuda":
        candidates = candidates_for(options, work, console)
        if len(candidates) > 1:
            training = training_rates(recipe, options, work, candidates, console)
            release_memory(work.device)
            name, why = choose(training)
            show("training: images/s by backend and decoder", training, name, why, console)
        else:
            name = next(iter(candidates))
        chosen |= candidates[name]
    results = sweep_settings(work, chosen, options, console)
    words = [word for name, value in chosen.items() for word in (f"--data.{name.replace('_', '-')}", str(value))]
    console.print(f"iwm/train.py {' '.join([recipe, *words])}", soft_wrap=True, highlight=False)
    return {
        "settings": settings_of(options),
        "shards": str(work.folder),
        "batch_size": work.batch_size,
        "training": rounded(training),
        "sweeps": results,
        "data": chosen,
    }


def candidates_for(options: TuneOptions, work: LoaderSetup, console: Console) -> dict[str, LoaderSettings]:
    """Return the implementations to compare on a GPU by name, in order of preference: settings of the data section.

    Backends that this machine cannot run are reported. Raises ConfigError where none is left.
    """
    found: dict[str, LoaderSettings] = {}
    refused = None
    width, height = decoder_size_hint(work.folder, work.split)
    engine = {"hw_decoder_load": ENGINE_SHARE, "decoder_width_hint": width, "decoder_height_hint": height}
    for backend in dict.fromkeys(options.backends):
        try:
            select_backend(backend, work.device, work.views, "--backends")
        except ConfigError as error:
            console.print(f"without {backend}: {error}")
            refused = error
            continue
        if backend == "cpu":
            found["cpu"] = {"backend": "cpu"}
        else:
            found[f"{backend}, nvJPEG"] = {"backend": backend, "decoder_device": "gpu", "hw_decoder_load": 0.0}
            found[f"{backend}, engine"] = {"backend": backend, "decoder_device": "gpu", **engine}
            found[f"{backend}, decoded on CPU cores"] = {"backend": backend, "decoder_device": "cpu"}
    if refused is not None and not found:
        raise refused
    if not found:
        raise BenchmarkError("--backends: name at least one")
    return found


def sweep_settings(
    work: LoaderSetup, chosen: dict[str, Any], options: TuneOptions, console: Console
) -> list[dict[str, Any]]:
    """Sweep the settings one after another, add the best values to `chosen`, and return the sweeps' results."""
    results = []
    for sweep in sweeps_for(work.cores):
        rates = measured(work, sweep, chosen, options, console)
        value, why = choose(rates)
        chosen[sweep.setting] = value
        results.append({"setting": sweep.setting, "images_per_second": rounded(rates), "chosen": value, "why": why})
        paced = " with a consumer as slow as the pipeline" if sweep.paced else ""
        show(f"data.{sweep.setting}: images/s{paced}", rates, value, why, console)
    return results


def loader_setup(options: TuneOptions, console: Console) -> LoaderSetup:
    """Return the loader setup. Raises BenchmarkError or ConfigError for options that the machine cannot run."""
    device = select_device(options.device, "--device")
    config = lookup("--recipe", options.recipe or GPU_RECIPE, RECIPES)()
    if options.scenario:
        config = with_scenario(config, options.scenario)
    own = config.data.folder if options.recipe else None
    folder = options.shards or own or generated_shards(console)
    share = min(
        config.data.micro_batch_size or config.data.global_batch_size,
        config.data.global_batch_size // options.processes,
    )
    batch = options.batch_size or max(1, min(share, 256 if device.type == "cuda" else 64))
    samples = load_manifest(folder, options.split).samples
    if samples < batch:
        raise BenchmarkError(
            f"--batch-size {batch}: {folder} has only {samples} images in '{options.split}'; choose at most {samples}"
        )
    return LoaderSetup(folder, options.split, config.views, batch, device, loader_threads(device, options.processes))


def sweeps_for(cores: int) -> list[SettingSweep]:
    """Return the sweeps in order."""
    threads = sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})
    return [
        SettingSweep("num_threads", threads),
        SettingSweep("prefetch_queue_depth", (1, 2, 3, 4), paced=True),
    ]


def measured(
    work: LoaderSetup, sweep: SettingSweep, chosen: LoaderSettings, options: TuneOptions, console: Console
) -> dict[int, list[float]]:
    """Measure the images/s of each candidate, a value per turn, with the settings `chosen` so far."""
    rates: dict[int, list[float]] = {value: [] for value in sweep.candidates}
    pause = 0.0
    if sweep.paced:
        pause = work.batch_size / rate(work, {**chosen, sweep.setting: sweep.candidates[0]}, options.seconds, 0.0)
    for turn in range(options.repeats):
        for value, turns in rates.items():
            with console.status(f"turn {turn + 1} of {options.repeats}: {sweep.setting} {value}"):
                turns.append(rate(work, {**chosen, sweep.setting: value}, options.seconds, pause))
    return rates


def rounded(rates: Mapping[CandidateT, Sequence[float]]) -> dict[str, list[float]]:
    """Return the rates for JSON."""
    return {str(value): [round(rate, 1) for rate in turns] for value, turns in rates.items()}


def show(title: str, rates: Mapping[Any, Sequence[float]], value: Any, why: str, console: Console) -> None:
    rows = [
        [str(candidate), *(f"{f(turns):.0f}" for f in (np.median, min, max)), "chosen" if candidate == value else ""]
        for candidate, turns in rates.items()
    ]
    console.print(ResultTable(title, ["", "median", "lowest", "highest", ""], rows))
    console.print(why)


CandidateT = TypeVar("CandidateT", str, int)
"""Name or value of a candidate."""

NOISE_MARGIN = 0.02
"""Relative difference below which two candidates count as equally fast."""


def choose(rates: Mapping[CandidateT, Sequence[float]]) -> tuple[CandidateT, str]:
    """Return the first candidate that is about as fast as the fastest, and the reason.

    rates: images/s of each candidate, in order of preference, a value per turn. A candidate is about as fast if it is
    so in a quarter of the turns. A disturbance of a turn slows both, so a candidate that is really slower is slower in
    nearly all turns.
    """
    fastest = max(rates, key=lambda value: float(np.median(rates[value])))

    def share(value: CandidateT, percentile: float) -> float:
        return float(np.percentile(np.divide(rates[value], rates[fastest]), percentile))

    value = next(value for value in rates if share(value, 75) >= 1 - NOISE_MARGIN)
    if value == fastest:
        return value, f"{value} is the fastest, and none before it keeps up"
    return value, f"{fastest} is the fastest; {value} keeps up, at {share(value, 50):.2f} of its speed in the median"

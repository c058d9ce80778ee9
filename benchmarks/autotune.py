"""Mode `tune`: short sequential sweep over the pipeline's settings, which prints the options for training.

The settings affect speed only. Each setting's candidates are measured in turns; one is chosen, and the next setting is
swept with it. A candidate's pipeline is built for each turn and freed after it, so that two pipelines never share the
cores and the GPU's memory. A turn is measured after the pipeline has settled.

On a GPU this is done for each backend of the pipeline, and training itself is then measured with each backend and the
settings chosen for it: a pipeline that is fast alone may slow the model down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from environment import BenchmarkError, lookup
from loader_rates import (
    LoaderSettings,
    LoaderSetup,
    decoder_size_hint,
    model_rate,
    option,
    rate,
    training_rates,
)
from options import TuneOptions
from rich.console import Console
from rich.table import Table
from synthetic_data import generated_shards

from dali_pipelines.augmentations import ViewBackend
from iwm.ranges import ConfigError, check_ranges
from iwm.recipes import RECIPES, with_scenario
from iwm.training.distributed import loader_threads
from iwm.training.runtime import select_backend, select_device
from shards.format import load_manifest

PAPER = "iwm_b16_equi_18x384"
"""Default recipe."""

SHARE = "hw_decoder_load"


class SettingSweep(NamedTuple):
    """One setting and its candidates, in order of preference."""

    setting: str
    candidates: Sequence[int | float]
    paced: bool = False
    """True where the consumer pauses between batches for as long as a batch takes to make, as training does."""


def run(options: TuneOptions, console: Console) -> dict[str, Any]:
    """Measure, print a table per setting and the options, and return the results.

    Raises BenchmarkError, ConfigError and ShardError.
    """
    check_ranges(options)
    work, recipe = loader_setup(options, console), options.recipe or PAPER
    backends, hints, model = backends_for(options, work, console), dict[str, int | float](), None
    if set(backends) & set(ON_GPU):
        width, height = decoder_size_hint(work.folder, work.split)
        hints = {"decoder_width_hint": width, "decoder_height_hint": height}
        model = options.model_rate or model_rate(recipe, work, console)
    tuned: dict[ViewBackend, dict[str, int | float]] = {}
    sweeps: list[dict[str, Any]] = []
    for backend in backends:
        same = next((tuned[other] for other in ON_GPU if backend in ON_GPU and other in tuned), None)
        if same is None:
            begin = hints if backend in ON_GPU else {}
            tuned[backend], swept = sweep_settings(work._replace(backend=backend), begin, model, options, console)
            sweeps += swept
        else:
            tuned[backend] = same
    training: dict[ViewBackend, list[float]] = {}
    chosen, words = backends[0], [recipe]
    if len(backends) > 1:
        for backend in backends:
            pipeline = work._replace(backend=backend)
            training[backend] = training_rates(recipe, options.scenario, pipeline, tuned[backend], console)
        chosen, why = choose_backend(training)
        show("training: images/s by backend", training, chosen, why, console)
    if work.device.type == "cuda":
        words += ["--data.backend", chosen]
    words += [word for name, value in tuned[chosen].items() for word in (option(name), str(value))]
    console.print(f"iwm/train.py {' '.join(words)}", soft_wrap=True, highlight=False)
    return {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "shards": str(work.folder),
        "batch_size": work.batch_size,
        "model_rate": model,
        "sweeps": sweeps,
        "training": {backend: [round(rate, 1) for rate in rates] for backend, rates in training.items()},
        "backend": chosen,
        "data": tuned[chosen],
    }


ON_GPU: tuple[ViewBackend, ...] = ("gpu", "triton")
"""Backends that decode on the GPU. They do the same on the CPU and in the decoder, so they share their settings."""


def backends_for(options: TuneOptions, work: LoaderSetup, console: Console) -> list[ViewBackend]:
    """Return the backends to compare: on a GPU those of the options that this machine can run, else `cpu`.

    Others are reported. Raises ConfigError where none is left.
    """
    if work.device.type == "cpu":
        return ["cpu"]
    found: list[ViewBackend] = []
    refused = None
    for name in dict.fromkeys(options.backends):
        try:
            found.append(select_backend(name, work.device, work.views, "--backends"))
        except ConfigError as error:
            console.print(f"without {name}: {error}")
            refused = error
    if refused is not None and not found:
        raise refused
    if not found:
        raise BenchmarkError("--backends: name at least one")
    return found


def sweep_settings(
    work: LoaderSetup, begin: LoaderSettings, model: float | None, options: TuneOptions, console: Console
) -> tuple[dict[str, int | float], list[dict[str, Any]]]:
    """Sweep the settings of work.backend one after another. Return all settings with `begin`, and the sweeps' results.

    model: the model's images/s, for which the decoder's share is chosen.
    """
    chosen, results = dict(begin), list[dict[str, Any]]()
    for sweep in sweeps_for(work.backend, work.cores):
        if sweep.setting == SHARE and model is not None:
            rates, value, why = decoder_share(work, sweep, chosen, model, options, console)
        else:
            rates = measured(work, sweep, chosen, options, console)
            value, why = choose(rates)
        chosen[sweep.setting] = value
        result = {"setting": sweep.setting, "images_per_second": by_name(rates), "chosen": value, "why": why}
        results.append({"backend": work.backend, **result})
        paced = " with a consumer as slow as the pipeline" if sweep.paced else ""
        show(f"backend {work.backend}, data.{sweep.setting}: images/s{paced}", rates, value, why, console)
    return chosen, results


def loader_setup(options: TuneOptions, console: Console) -> LoaderSetup:
    """Return the loader setup. Raises BenchmarkError or ConfigError for options that the machine cannot run."""
    device = select_device(options.device, "--device")
    config = lookup("--recipe", options.recipe, RECIPES)() if options.recipe else RECIPES[PAPER]()
    if options.scenario:
        config = with_scenario(config, options.scenario)
    own = config.data.shards if options.recipe else None
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


def sweeps_for(backend: ViewBackend | None, cores: int) -> list[SettingSweep]:
    """Return the sweeps in order. On a GPU the decoder's share is first, because it affects the CPU threads' work."""
    threads = sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {cores})
    decoder = [SettingSweep(SHARE, (1.0, 0.8, 0.65, 0.5, 0.0))] if backend in ON_GPU else []
    return [
        *decoder,
        SettingSweep("num_threads", threads),
        SettingSweep("prefetch_queue_depth", (1, 2, 3, 4), paced=True),
    ]


def measured(
    work: LoaderSetup, sweep: SettingSweep, chosen: LoaderSettings, options: TuneOptions, console: Console
) -> dict[int | float, list[float]]:
    """Measure the images/s of each candidate, a value per turn, with the settings `chosen` so far."""
    rates: dict[int | float, list[float]] = {value: [] for value in sweep.candidates}
    pause = 0.0
    if sweep.paced:
        pause = work.batch_size / rate(work, {**chosen, sweep.setting: sweep.candidates[0]}, options.seconds, 0.0)
    for turn in range(options.repeats):
        for value, turns in rates.items():
            with console.status(f"turn {turn + 1} of {options.repeats}: {sweep.setting} {value}"):
                turns.append(rate(work, {**chosen, sweep.setting: value}, options.seconds, pause))
    return rates


def decoder_share(
    work: LoaderSetup, sweep: SettingSweep, chosen: LoaderSettings, model: float, options: TuneOptions, console: Console
) -> tuple[Rates, int | float, str]:
    """Return the rates, the chosen share and the reason.

    The other candidates are measured only if the first one is too slow.
    """
    rates = measured(work, sweep._replace(candidates=sweep.candidates[:1]), chosen, options, console)
    if not enough(rates, model):
        rates = measured(work, sweep, chosen, options, console)
    return rates, *choose_share(rates, model)


def by_name(rates: Rates) -> dict[str, list[float]]:
    return {str(value): [round(rate, 1) for rate in turns] for value, turns in rates.items()}


def show(title: str, rates: Mapping[Any, Sequence[float]], value: Any, why: str, console: Console) -> None:
    table = Table(title=title)
    table.add_column("")
    for column in ("median", "lowest", "highest"):
        table.add_column(column, justify="right")
    for candidate, turns in rates.items():
        chosen = "← " if candidate == value else "  "
        table.add_row(f"{chosen}{candidate}", *(f"{f(turns):.0f}" for f in (np.median, min, max)))
    console.print(table)
    console.print(why)


Rates = Mapping[int | float, Sequence[float]]
"""Images/s of each candidate, in order of preference, a value per turn."""

NOISE_MARGIN = 0.02
"""Relative difference below which two candidates count as equally fast."""

HEADROOM = 1.3
"""Ratio of the pipeline's rate alone to the model's from which training should not wait for data."""


def choose(rates: Rates) -> tuple[int | float, str]:
    """Return the first candidate that is about as fast as the fastest, and the reason.

    This is the case if it is as fast in a quarter of the turns. A disturbance of a turn slows both, so a candidate that
    is really slower is slower in nearly all turns.
    """
    fastest = max(rates, key=lambda value: float(np.median(rates[value])))

    def share(value: int | float, percentile: float) -> float:
        return float(np.percentile(np.divide(rates[value], rates[fastest]), percentile))

    value = next(value for value in rates if share(value, 75) >= 1 - NOISE_MARGIN)
    if value == fastest:
        return value, f"{value} is the fastest, and none before it keeps up"
    return value, f"{fastest} is the fastest; {value} keeps up, at {share(value, 50):.2f} of its speed in the median"


def enough(rates: Rates, model: float) -> list[int | float]:
    """Return the candidates whose median rate is at least HEADROOM times the model's."""
    return [value for value, turns in rates.items() if float(np.median(turns)) >= HEADROOM * model]


def choose_share(rates: Rates, model: float) -> tuple[int | float, str]:
    """Return the largest share of the hardware decoder that is fast enough for the model, and the reason.

    It is not always the fastest: images decoded in hardware do not use the cores and multiprocessors that training
    uses. Where no share is fast enough, the choice is that of `choose`.
    """
    if fast := enough(rates, model):
        value = max(fast)
        times = float(np.median(rates[value])) / model
        return (
            value,
            f"{value} is the largest share with {HEADROOM} times the model's {model:.0f} images/s ({times:.2f})",
        )
    value, why = choose(rates)
    return value, f"none reaches {HEADROOM} times the model's {model:.0f} images/s; {why}"


def choose_backend(rates: Mapping[ViewBackend, Sequence[float]]) -> tuple[ViewBackend, str]:
    """Return the first backend with which training is about as fast as with the fastest, and the reason.

    The backends are measured one after another, so their medians are compared.
    """
    medians = {backend: float(np.median(turns)) for backend, turns in rates.items()}
    fastest = max(medians, key=lambda backend: medians[backend])
    value = next(backend for backend in medians if medians[backend] >= (1 - NOISE_MARGIN) * medians[fastest])
    if value == fastest:
        return value, f"training is fastest with {value}, and none before it keeps up"
    return (
        value,
        f"training is fastest with {fastest}; {value} keeps up, at {medians[value] / medians[fastest]:.2f} of it",
    )

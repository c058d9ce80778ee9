"""Modes `model`, `end-to-end`, `interference` and `all`: training throughput and its bottleneck.

Measurements are taken in turns. Under torchrun every process measures its share, and the first one reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from baselines import ijepa_step, plain_step
from environment import BenchmarkError
from options import AllOptions, EndToEndOptions, InterferenceOptions, ModelOptions, StepOptions
from pipeline_profile import pipeline_limits, pipeline_stages
from rich.console import Console
from step_modes import (
    MakeBaseline,
    cooldown_steps,
    measure_baseline,
    measure_data,
    measure_end_to_end,
    measure_interference,
    measure_model,
    measure_updates,
    new_train_state,
    resident_batches,
    token_counts,
)
from synthetic_data import prepare_shards
from tables import bottleneck, ratios, show_pipeline, show_together, show_training
from timing import Measured, Repeat, compiled_graphs, interleave, paired_ratio, percentiles, release_memory, traced

from iwm.config_io import to_dict
from iwm.models.flops import measure_matmul_flops, training_flops
from iwm.training.distributed import DistEnv, init_distributed, loader_threads

MEASURED: dict[type[StepOptions], tuple[str, ...]] = {
    ModelOptions: ("model",),
    EndToEndOptions: ("end-to-end",),
    InterferenceOptions: ("model", "interference"),
    AllOptions: ("data", "model", "interference", "end-to-end"),
}
"""Measurements of each mode, in the order of a turn. --profile traces the last one."""


def run(options: StepOptions, console: Console) -> dict[str, Any]:
    """Measure, print tables on the first process, and return the results for --json.

    Raises BenchmarkError, ConfigError and ShardError.
    """
    options.check()
    config = options.config
    with init_distributed(config.train) as dist:
        console.quiet = not dist.is_main
        prepare_shards(options.config.data, dist, console)
        rivals = (
            (plain_step.baseline_step, ijepa_step.baseline_step)
            if isinstance(options, ModelOptions) and options.baselines
            else ()
        )
        try:
            result = measure(options, MEASURED[type(options)], rivals, dist, console)
        except torch.OutOfMemoryError as error:
            raise BenchmarkError(
                f"--data.global-batch-size {config.data.global_batch_size}: out of GPU memory; "
                "lower it or set --data.micro-batch-size"
            ) from error
    show_training(result, console)
    if isinstance(options, AllOptions) and dist.is_main:
        result |= together(result, options, dist, console)
    return result


def together(result: dict[str, Any], options: AllOptions, dist: DistEnv, console: Console) -> dict[str, Any]:
    """Measure and return what mode `all` adds to the training measurements."""
    config, added = options.config, dict[str, Any]()
    if options.baselines:
        # The model, its optimiser and its pipeline are no longer needed, and the baselines need their memory.
        release_memory(dist.device)
        added["pipeline_limits"] = pipeline_limits(config, dist.device, result["pipeline_threads"], console)
        added["pipeline_stages"] = pipeline_stages(config, dist.device, result["pipeline_threads"], console)
        show_pipeline(added, console)
    rates = {name: mode["turns"] for name, mode in result["modes"].items()}
    clock, cpu = (
        {name: mode[rate]["median"] for name, mode in result["modes"].items()}
        for rate in ("images_per_second", "images_per_cpu_second")
    )
    added |= {"ratios": ratios(rates), "bottleneck": bottleneck(clock, None if dist.device.type == "cuda" else cpu)}
    show_together(added, console)
    return added


UPDATES = 10
"""Number of times that optimiser and EMA are measured alone in each turn."""


def measure(
    options: StepOptions, modes: Sequence[str], rivals: Sequence[MakeBaseline], dist: DistEnv, console: Console
) -> dict[str, Any]:
    """Measure the given modes, in this order in each turn, and then the baseline steps.

    --profile traces the last mode. All processes must call this; each returns the whole result.
    """
    config, device = options.config, dist.device
    state = new_train_state(config, dist)
    batches = resident_batches(state)
    with console.status("warming up"):
        first = measure_model(state, batches, 1)
        others = measure_model(state, batches, options.warmup - 1)
    graphs = compiled_graphs()

    flops, images = training_flops(config), state.micro_batch * state.accumulation
    ways = {
        "data": Measured(partial(measure_data, state), images),
        "model": Measured(partial(measure_model, state, batches), images, flops.total),
        "interference": Measured(partial(measure_interference, state, batches), images, flops.total),
        "end-to-end": Measured(partial(measure_end_to_end, state), images, flops.total),
    }
    measured = {name: ways[name] for name in modes}
    for make in rivals:
        rival = make(config, dist, batches)
        measured[rival.name] = Measured(partial(measure_baseline, dist, rival), rival.images, rival.flops)
        # Its shapes vary with the masks, so the allocator needs many steps until it has blocks for all of them.
        with console.status(f"warming up: {rival.name}"):
            measure_baseline(dist, rival, options.warmup)

    peaks: list[float] = []
    updates: dict[str, list[float]] = {"optimiser": [], "ema": []}

    def between_turns() -> None:
        peaks.append(measure_matmul_flops(device, config.train.precision))
        for name, window in measure_updates(state, UPDATES).items():
            updates[name] += [1e3 * seconds for seconds in window.steps]

    with console.status("") as status:
        turns = interleave(
            measured,
            dist,
            seconds=options.seconds,
            repeats=options.repeats,
            settling=cooldown_steps(state),
            between=between_turns,
            status=status.update,
            report=partial(console.print, highlight=False),
        )
    recompilations = compiled_graphs() - graphs
    peak = percentiles(peaks)
    return {
        "recipe": options.recipe,
        "scenario": options.scenario,
        "settings": {"seconds": options.seconds, "repeats": options.repeats, "warmup": options.warmup},
        "config": to_dict(config),
        "device": device.type,
        "processes": dist.size,
        "pipeline_threads": config.data.num_threads or loader_threads(device, dist.local_size),
        "torch_threads": torch.get_num_threads(),
        "optimiser": f"{type(state.optimizer).__module__}.{type(state.optimizer).__name__}",
        "warm_up": {"first_step_seconds": first.seconds, "seconds": first.seconds + others.seconds},
        "graphs": graphs,
        "recompilations": recompilations,
        "peak_flops": peak,
        "flops_per_image": asdict(flops),
        "modes": {name: summarised(turns[name], measured[name], peak["median"] * dist.size) for name in measured},
        "flop_for_flop": flops_normalized_speedup(turns, measured, [name for name in measured if name not in ways]),
        "updates": {name: percentiles(ms) for name, ms in updates.items()},
        "tokens": token_counts(state),
        "operators": None if options.profile is None else traced(measured[modes[-1]].window, options.profile, dist),
    }


def summarised(turns: Sequence[Repeat], measured: Measured, peak: float) -> dict[str, Any]:
    """Summarise all turns of one measurement. peak: FLOP/s of all devices together."""
    rates = [turn.images_per_second for turn in turns]
    seconds = sum(turn.window.seconds for turn in turns)
    steps = [1e3 * step for turn in turns for step in turn.window.steps]
    return {
        "images_per_second": percentiles(rates),
        "turns": rates,
        "images_per_cpu_second": percentiles([turn.images_per_cpu_second for turn in turns]),
        "step_ms": percentiles(steps),
        "steps": len(steps),
        "seconds": seconds,
        "data_wait": sum(turn.window.waited for turn in turns) / seconds,
        "memory_gib": max(turn.memory_gib for turn in turns),
        "flops_per_image": measured.flops,
        "mfu": None if measured.flops is None else float(np.median(rates)) * measured.flops / peak,
    }


def flops_normalized_speedup(
    turns: Mapping[str, Sequence[Repeat]], measured: Mapping[str, Measured], rivals: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return the model's rate over each baseline's, both in needed FLOPs, by paired turns."""

    def rates(name: str) -> list[float]:
        return [turn.images_per_second * (measured[name].flops or 0.0) for turn in turns[name]]

    return {name: paired_ratio(rates("model"), rates(name)) for name in rivals}

"""Measure training in turns, and put together what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from contender import MakeContender, measure_contender
from rich.console import Console
from step_modes import (
    measure_data,
    measure_end_to_end,
    measure_interference,
    measure_model,
    measure_updates,
    open_subject,
    resident_batches,
    settling_steps,
    token_counts,
)
from step_options import StepOptions
from step_trace import traced
from stopwatch import compiled_graphs
from turns import Measured, Turn, interleave, ratio, spread

from iwm.config import to_dict
from iwm.flops import measured_peak, training_flops
from iwm.training.distributed import World, loader_threads

UPDATES = 10
"""Times that optimiser and EMA are measured by themselves in each turn."""


def measure(
    options: StepOptions, modes: Sequence[str], rivals: Sequence[MakeContender], here: World, console: Console
) -> dict[str, Any]:
    """The modes of that name, in this order in each turn, then the steps that the model's is compared with.

    --profile looks at the last mode. All processes call this; each has the whole result.
    """
    config, device = options.config, here.device
    session = open_subject(config, here)
    batches = resident_batches(session)
    with console.status("warming up"):
        first = measure_model(session, batches, 1)
        others = measure_model(session, batches, options.warmup - 1)
    graphs = compiled_graphs()

    flops, images = training_flops(config), session.micro_batch * session.accumulation
    ways = {
        "data": Measured(partial(measure_data, session), images),
        "model": Measured(partial(measure_model, session, batches), images, flops.total),
        "interference": Measured(partial(measure_interference, session, batches), images, flops.total),
        "end-to-end": Measured(partial(measure_end_to_end, session), images, flops.total),
    }
    measured = {name: ways[name] for name in modes}
    for make in rivals:
        rival = make(config, here, batches)
        measured[rival.name] = Measured(partial(measure_contender, here, rival), rival.images, rival.flops)

    peaks: list[float] = []
    updates: dict[str, list[float]] = {"optimiser": [], "ema": []}

    def between_turns() -> None:
        peaks.append(measured_peak(device, config.train.precision))
        for name, window in measure_updates(session, UPDATES).items():
            updates[name] += [1e3 * seconds for seconds in window.steps]

    with console.status("") as status:
        turns = interleave(
            measured,
            here,
            seconds=options.seconds,
            repeats=options.repeats,
            settling=settling_steps(session),
            between=between_turns,
            say=status.update,
        )
    recompilations = compiled_graphs() - graphs
    peak = spread(peaks)
    return {
        "recipe": options.recipe,
        "scenario": options.scenario,
        "settings": {"seconds": options.seconds, "repeats": options.repeats, "warmup": options.warmup},
        "config": to_dict(config),
        "device": device.type,
        "processes": here.size,
        "pipeline_threads": config.data.threads or loader_threads(device, here.local_size),
        "torch_threads": torch.get_num_threads(),
        "optimiser": f"{type(session.optimizer).__module__}.{type(session.optimizer).__name__}",
        "warm_up": {"first_step_seconds": first.seconds, "seconds": first.seconds + others.seconds},
        "graphs": graphs,
        "recompilations": recompilations,
        "peak_flops": peak,
        "flops_per_image": asdict(flops),
        "modes": {name: summarised(turns[name], measured[name], peak["median"] * here.size) for name in measured},
        "flop_for_flop": flop_for_flop(turns, measured, [name for name in measured if name not in ways]),
        "updates": {name: spread(ms) for name, ms in updates.items()},
        "tokens": token_counts(session),
        "operators": None if options.profile is None else traced(measured[modes[-1]].window, options.profile, here),
    }


def summarised(turns: Sequence[Turn], measured: Measured, peak: float) -> dict[str, Any]:
    """All turns of one thing. peak: FLOP/s of all devices together."""
    rates = [turn.images_per_second for turn in turns]
    seconds = sum(turn.window.seconds for turn in turns)
    steps = [1e3 * step for turn in turns for step in turn.window.steps]
    return {
        "images_per_second": spread(rates),
        "turns": rates,
        "images_per_cpu_second": spread([turn.images_per_cpu_second for turn in turns]),
        "step_ms": spread(steps),
        "steps": len(steps),
        "seconds": seconds,
        "data_wait": sum(turn.window.waited for turn in turns) / seconds,
        "memory_gib": max(turn.memory_gib for turn in turns),
        "flops_per_image": measured.flops,
        "mfu": None if measured.flops is None else float(np.median(rates)) * measured.flops / peak,
    }


def flop_for_flop(
    turns: Mapping[str, Sequence[Turn]], measured: Mapping[str, Measured], rivals: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The model's rate over each rival's, both in FLOPs that are needed, turn by turn."""

    def rates(name: str) -> list[float]:
        return [turn.images_per_second * (measured[name].flops or 0.0) for turn in turns[name]]

    return {name: ratio(rates("model"), rates(name)) for name in rivals}

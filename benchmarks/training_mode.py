"""Modes `model`, `end-to-end`, `interference` and `all`: how fast training is, and what holds it back.

Under torchrun every process measures its share, and the first one reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines import ijepa_step, plain_step
from measurement import measure
from mistakes import BenchmarkError
from picture import check_name
from pipeline_alone import pipeline_limits, pipeline_stages
from rich.console import Console
from step_options import StepOptions
from step_tables import show_pipeline, show_together, show_training
from stopwatch import release_memory
from verdict import limit, ratios

from iwm.training.distributed import World, world


@dataclass(frozen=True)
class Model(StepOptions):
    """Training steps on resident batches, each with masks of its own."""

    baselines: bool = False
    """Also the plain eager step, and a step written the way I-JEPA's public code works."""


@dataclass(frozen=True)
class EndToEnd(StepOptions):
    """Training: pipeline and model, as iwm/train.py runs them."""


@dataclass(frozen=True)
class Interference(StepOptions):
    """Training steps on resident batches, without and with the pipeline at work beside them."""


@dataclass(frozen=True)
class All(StepOptions):
    """All of these and the pipeline alone, what they say together, and the pipeline's parts and rivals."""

    baselines: bool = True
    """Also the pipeline's operators one by one, pure JPEG decoding, and torchvision's loader."""
    plot: Path | None = None
    """File for a picture, .png or .svg: each stage against its limit."""

    def check(self) -> None:
        super().check()
        if self.plot is not None:
            check_name(self.plot)


MEASURED: dict[type[StepOptions], tuple[str, ...]] = {
    Model: ("model",),
    EndToEnd: ("end-to-end",),
    Interference: ("model", "interference"),
    All: ("data", "model", "interference", "end-to-end"),
}
"""What each mode measures, in the order of a turn. The last is what --profile looks at."""


def run(options: StepOptions, console: Console) -> dict[str, Any]:
    """Measure, print tables, and return what goes into --json. On processes other than the first it prints nothing.

    Raises BenchmarkError, ConfigError and ShardError.
    """
    options.check()
    config = options.config
    with world(config.train) as here:
        console.quiet = not here.main
        options.prepare(here, console)
        rivals = (
            (plain_step.contender, ijepa_step.contender) if isinstance(options, Model) and options.baselines else ()
        )
        try:
            result = measure(options, MEASURED[type(options)], rivals, here, console)
        except torch.OutOfMemoryError as error:
            raise BenchmarkError(
                f"--data.batch {config.data.batch}: more than the GPU can hold; lower it or set --data.micro-batch"
            ) from error
    show_training(result, console)
    if isinstance(options, All) and here.main:
        result |= together(result, options, here, console)
    return result


def together(result: dict[str, Any], options: All, here: World, console: Console) -> dict[str, Any]:
    """What mode `all` adds to what was measured of training."""
    config, added = options.config, dict[str, Any]()
    if options.baselines:
        # The model, its optimiser and its pipeline have been measured; what follows needs the memory.
        release_memory(here.device)
        added["pipeline_limits"] = pipeline_limits(config, here.device, result["pipeline_threads"], console)
        added["pipeline_stages"] = pipeline_stages(config, here.device, result["pipeline_threads"], console)
        show_pipeline(added, console)
    rates = {name: mode["turns"] for name, mode in result["modes"].items()}
    clock, cpu = (
        {name: mode[rate]["median"] for name, mode in result["modes"].items()}
        for rate in ("images_per_second", "images_per_cpu_second")
    )
    added |= {"ratios": ratios(rates), "limit": limit(clock, None if here.device.type == "cuda" else cpu)}
    show_together(added, console)
    return added

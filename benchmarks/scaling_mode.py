"""Mode `scaling`: what more processes bring, each with as many images as before (weak scaling).

torchrun --nproc_per_node N benchmarks/throughput.py scaling [--recipe R]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from mistakes import BenchmarkError
from rich.console import Console
from rich.table import Table
from scaling_formulas import BUCKET, all_reduce_traffic, gradient_bytes, parameters
from step_modes import open_subject, resident_batches, take_step
from step_options import BATCH_EACH, StepOptions
from stopwatch import timed
from turns import LEAST_STEPS, ratio, spread

from iwm.models.world_model import WorldModel
from iwm.training.distributed import World, world
from iwm.training.optim import build_optimizer
from iwm.training.session import Session
from iwm.training.step import Gradient


@dataclass(frozen=True)
class Scaling(StepOptions):
    """Images per second of N processes over N times one process, and what their all-reduce costs; under torchrun."""

    images: int | None = None
    """Images of a step on each process, however many processes there are. None: --data.batch, at most 256."""


def run(options: Scaling, console: Console) -> dict[str, Any]:
    """Measure, print a table, and return what goes into --json. On processes other than the first it prints nothing.

    Raises BenchmarkError, ConfigError and ShardError.
    """
    options.check()
    if options.profile is not None:
        raise BenchmarkError(
            "--profile: scaling makes no trace; throughput.py model --profile does, also under torchrun"
        )
    config = options.config
    if config.train.parallel != "ddp":
        raise BenchmarkError(f"--train.parallel {config.train.parallel}: scaling knows the all-reduce of ddp alone")
    with world(config.train) as here:
        console.quiet = not here.main
        if here.size == 1:
            raise BenchmarkError(
                "scaling: needs several processes: torchrun --nproc_per_node 2 benchmarks/throughput.py scaling"
            )
        images = options.images or min(config.data.batch, BATCH_EACH)
        options = replace(options, config=replace(config, data=replace(config.data, batch=images * here.size)))
        options.prepare(here, console)
        result = measure(options, here, console)
    show(result, console)
    return result


class Ways(NamedTuple):
    """Seconds per step of each window, on this process; no number where it stood by."""

    alone: list[float]
    """The first process takes steps, the others wait."""
    beside: list[float]
    """All take steps and exchange nothing: what they cost each other by being there."""
    together: list[float]
    """All train one model, as training does."""
    all_reduce: list[float]
    """They exchange a gradient and do nothing else."""


def measure(options: Scaling, here: World, console: Console) -> dict[str, Any]:
    """All ways in turn, `--repeats` times."""
    session = open_subject(options.config, here)
    single = by_itself(session)
    batches = resident_batches(session)
    gradient = [torch.zeros(n, device=here.device) for n in bucket_sizes(session.model)]
    steps_of: dict[str, Callable[[], object]] = {
        "alone": partial(take_step, single, batches),
        "beside": partial(take_step, single, batches),
        "together": partial(take_step, session, batches),
        "all_reduce": partial(reduce_all, gradient),
    }
    with console.status("warming up"):
        timed(steps_of["beside"], options.warmup, here.device)
        slowest = max(here.gather(max(timed(steps_of["together"], options.warmup, here.device)[-LEAST_STEPS:])))
    # The three that train share the time; an all-reduce is a small part of a step.
    steps = max(LEAST_STEPS, int(options.seconds / (3 * options.repeats * slowest)))
    ways = Ways([], [], [], [])
    for turn in range(options.repeats):
        for name, step in steps_of.items():
            with console.status(f"turn {turn + 1} of {options.repeats}: {name}"):
                here.gather(f"ready for {name}")
                takes_part = name != "alone" or here.main
                seconds = sum(timed(step, steps, here.device)) / steps if takes_part else float("nan")
                getattr(ways, name).append(seconds)
    images = session.micro_batch * session.accumulation
    processes = [Ways(*process) for process in here.gather(tuple(ways))]
    return {
        "recipe": options.recipe,
        "processes": here.size,
        "device": here.device.type,
        "images_per_process": images,
        "steps_per_turn": steps,
        **summarised(processes, images, sent=sum(4 * len(bucket) for bucket in gradient)),
    }


def by_itself(session: Session) -> Session:
    """A session on the same batches and masks with a model of its own, which exchanges nothing with other processes."""
    here = replace(session.here, size=1)
    model = WorldModel(session.config).prepare(here.device, compiled=session.config.train.compile)
    optimizer, _ = build_optimizer(model, session.config.optim, here.device)
    return replace(session, here=here, model=model, gradient=Gradient(model, model), optimizer=optimizer)


def bucket_sizes(model: WorldModel) -> list[int]:
    """Elements of the gradients that DDP sends one after another; fp32."""
    whole, rest = divmod(gradient_bytes(parameters(model, trained=True)), BUCKET)
    return [BUCKET // 4] * whole + ([rest // 4] if rest else [])


def reduce_all(gradient: list[torch.Tensor]) -> None:
    """All-reduce a gradient bucket by bucket, as DDP does, with nothing beside it."""
    for work in [dist.all_reduce(bucket, async_op=True) for bucket in gradient]:
        work.wait()


def summarised(processes: list[Ways], images: int, sent: int) -> dict[str, Any]:
    """Rates of all processes together, turn by turn, and what follows from them.

    processes: by rank; images: of a step of each; sent: bytes of a gradient.
    """
    n = len(processes)
    alone = [images / seconds for seconds in processes[0].alone]
    beside, together = (
        [float(sum(images / seconds for seconds in turn)) for turn in zip(*windows, strict=True)]
        for windows in ([p.beside for p in processes], [p.together for p in processes])
    )
    step, apart, exchange = (
        np.mean([getattr(p, name) for p in processes], axis=0) for name in ("together", "beside", "all_reduce")
    )
    shown = [max(0.0, float(s - a)) for s, a in zip(step, apart, strict=True)]
    hidden = [max(0.0, 1 - s / float(e)) for s, e in zip(shown, exchange, strict=True)]
    perfect = [n * rate for rate in alone]
    return {
        "images_per_second": {"alone": spread(alone), "beside": spread(beside), "together": spread(together)},
        "efficiency": ratio(together, perfect),
        "efficiency_without_exchange": ratio(beside, perfect),
        "step_ms": {"beside": spread(list(1e3 * apart)), "together": spread(list(1e3 * step))},
        "gradient_bytes": sent,
        "all_reduce_ms": spread(list(1e3 * exchange)),
        "bus_bandwidth_gb": spread([1e-9 * all_reduce_traffic(sent, n) / float(e) for e in exchange]),
        "exchange_shown_ms": spread([1e3 * s for s in shown]),
        "exchange_hidden": spread(hidden),
    }


def show(result: dict[str, Any], console: Console) -> None:
    n, rates = result["processes"], result["images_per_second"]
    table = Table(
        title=f"{result['recipe']}, {result['images_per_process']} images on each of {n} processes, {result['device']}"
    )
    table.add_column("")
    for column in ("images/s", "p10", "p90", f"of {n} × alone"):
        table.add_column(column, justify="right")
    efficiency = {"beside": result["efficiency_without_exchange"], "together": result["efficiency"]}
    for name, meaning in (
        ("alone", "one process, the others wait"),
        ("beside", f"{n} that exchange nothing"),
        ("together", f"{n} that train one model"),
    ):
        cells = [f"{rates[name][column]:.4g}" for column in ("median", "p10", "p90")]
        if against := efficiency.get(name):
            cells.append(f"{against['median']:.2f} ({against['lowest']:.2f}–{against['highest']:.2f})")
        table.add_row(meaning, *cells)
    console.print(table)
    sent, exchange = result["gradient_bytes"] / 2**20, result["all_reduce_ms"]["median"]
    console.print(
        f"a step sends {sent:.1f} MiB of gradients: {exchange:.3g} ms by itself "
        f"({result['bus_bandwidth_gb']['median']:.3g} GB/s of bus bandwidth). It costs the step "
        f"{result['exchange_shown_ms']['median']:.3g} ms, waiting for one another included, which hides "
        f"{result['exchange_hidden']['median']:.0%} of it"
    )

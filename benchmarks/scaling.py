"""Mode `scaling`: weak scaling over processes, with a constant batch size per process.

torchrun --nproc_per_node N benchmarks/throughput.py scaling [--recipe R]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from environment import BenchmarkError
from options import BATCH_EACH, ScalingOptions
from rich.console import Console
from scaling_model import BUCKET, all_reduce_traffic, gradient_bytes, parameters
from step_modes import new_train_state, resident_batches, take_step
from synthetic_data import prepare_shards
from timing import MIN_STEPS, paired_ratio, percentiles, ratio_text, timed

from iwm.evaluation.result_table import ResultTable
from iwm.models.world_model import WorldModel
from iwm.training.distributed import DistEnv, init_distributed
from iwm.training.optim import build_optimizer
from iwm.training.step import ForwardBackward
from iwm.training.train_state import TrainState, build_model


def run(options: ScalingOptions, console: Console) -> dict[str, Any]:
    """Measure, print a table on the first process, and return the results for --json.

    Raises BenchmarkError, ConfigError and ShardError.
    """
    options.check()
    if options.profile is not None:
        raise BenchmarkError(
            "--profile: mode scaling does not write traces; use throughput.py model --profile, also under torchrun"
        )
    config = options.config
    if config.train.parallel != "ddp":
        raise BenchmarkError(f"--train.parallel {config.train.parallel}: mode scaling supports only ddp")
    with init_distributed(config.train) as dist:
        console.quiet = not dist.is_main
        if dist.size == 1:
            raise BenchmarkError(
                "mode scaling needs several processes; use torchrun --nproc_per_node 2 benchmarks/throughput.py scaling"
            )
        images = options.images or min(config.data.global_batch_size, BATCH_EACH)
        options = replace(
            options, config=replace(config, data=replace(config.data, global_batch_size=images * dist.size))
        )
        prepare_shards(options.config.data, dist, console)
        result = measure(options, dist, console)
    show(result, console)
    return result


class Ways(NamedTuple):
    """Seconds per step of each window on this process; NaN where it was idle."""

    alone: list[float]
    """The first process takes steps; the others wait."""
    beside: list[float]
    """All processes take steps without communication; this shows their interference."""
    together: list[float]
    """All processes train one model, as in training."""
    all_reduce: list[float]
    """All processes only all-reduce a gradient."""


def measure(options: ScalingOptions, dist: DistEnv, console: Console) -> dict[str, Any]:
    """Measure all ways in turns, `--repeats` times."""
    state = new_train_state(options.config, dist)
    single = by_itself(state)
    batches = resident_batches(state)
    gradient = [torch.zeros(n, device=dist.device) for n in bucket_sizes(state.model)]
    steps_of: dict[str, Callable[[], object]] = {
        "alone": partial(take_step, single, batches),
        "beside": partial(take_step, single, batches),
        "together": partial(take_step, state, batches),
        "all_reduce": partial(reduce_all, gradient),
    }
    with console.status("warming up"):
        timed(steps_of["beside"], options.warmup, dist.device)
        slowest = max(dist.all_gather(max(timed(steps_of["together"], options.warmup, dist.device)[-MIN_STEPS:])))
    # The three ways that train share the time; an all-reduce is a small part of a step.
    steps = max(MIN_STEPS, int(options.seconds / (3 * options.repeats * slowest)))
    ways = Ways([], [], [], [])
    for turn in range(options.repeats):
        for name, step in steps_of.items():
            with console.status(f"turn {turn + 1} of {options.repeats}: {name}"):
                dist.all_gather(f"ready for {name}")
                takes_part = name != "alone" or dist.is_main
                seconds = sum(timed(step, steps, dist.device)) / steps if takes_part else float("nan")
                getattr(ways, name).append(seconds)
    images = state.micro_batch * state.accumulation
    processes = [Ways(*process) for process in dist.all_gather(tuple(ways))]
    return {
        "recipe": options.recipe,
        "processes": dist.size,
        "device": dist.device.type,
        "images_per_process": images,
        "steps_per_turn": steps,
        **summarised(processes, images, sent=sum(4 * len(bucket) for bucket in gradient)),
    }


def by_itself(state: TrainState) -> TrainState:
    """Return a state with the same batches and masks and its own model, which does not communicate."""
    dist = replace(state.dist, size=1)
    model, _ = build_model(state.config, dist.device, state.micro_batch)
    optimizer, _ = build_optimizer(model, state.config.optim, dist.device)
    return replace(state, dist=dist, model=model, forward_backward=ForwardBackward(model, model), optimizer=optimizer)


def bucket_sizes(model: WorldModel) -> list[int]:
    """Return the numbers of float32 elements in DDP's gradient buckets."""
    whole, rest = divmod(gradient_bytes(parameters(model, trained=True)), BUCKET)
    return [BUCKET // 4] * whole + ([rest // 4] if rest else [])


def reduce_all(gradient: list[torch.Tensor]) -> None:
    """All-reduce a gradient bucket by bucket, as DDP does, without concurrent work."""
    for work in [torch.distributed.all_reduce(bucket, async_op=True) for bucket in gradient]:
        work.wait()


def summarised(processes: list[Ways], images: int, sent: int) -> dict[str, Any]:
    """Summarise the rates of all processes together by turn, and the efficiencies and exchange times.

    processes: measurements by rank; images: batch size per process; sent: size of a gradient (bytes).
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
    exposed = [max(0.0, float(s - a)) for s, a in zip(step, apart, strict=True)]
    hidden = [max(0.0, 1 - s / float(e)) for s, e in zip(exposed, exchange, strict=True)]
    perfect = [n * rate for rate in alone]
    return {
        "images_per_second": {
            "alone": percentiles(alone),
            "beside": percentiles(beside),
            "together": percentiles(together),
        },
        "efficiency": paired_ratio(together, perfect),
        "efficiency_without_communication": paired_ratio(beside, perfect),
        "step_ms": {"beside": percentiles(list(1e3 * apart)), "together": percentiles(list(1e3 * step))},
        "gradient_bytes": sent,
        "all_reduce_ms": percentiles(list(1e3 * exchange)),
        "bus_bandwidth_gb": percentiles([1e-9 * all_reduce_traffic(sent, n) / float(e) for e in exchange]),
        "all_reduce_exposed_ms": percentiles([1e3 * s for s in exposed]),
        "all_reduce_overlapped": percentiles(hidden),
    }


def show(result: dict[str, Any], console: Console) -> None:
    n, rates = result["processes"], result["images_per_second"]
    rows = []
    efficiency = {"beside": result["efficiency_without_communication"], "together": result["efficiency"]}
    for name, meaning in (
        ("alone", "one process, the others wait"),
        ("beside", f"{n} without communication"),
        ("together", f"{n} training one model"),
    ):
        cells = (f"{rates[name][column]:.4g}" for column in ("median", "p10", "p90"))
        rows.append([meaning, *cells, ratio_text(efficiency.get(name))])
    title = f"{result['recipe']}, {result['images_per_process']} images on each of {n} processes, {result['device']}"
    console.print(ResultTable(title, ["", "images/s", "p10", "p90", f"of {n} × alone"], rows))
    sent, exchange = result["gradient_bytes"] / 2**20, result["all_reduce_ms"]["median"]
    console.print(
        f"A step all-reduces {sent:.1f} MiB of gradients: {exchange:.3g} ms alone "
        f"({result['bus_bandwidth_gb']['median']:.3g} GB/s of bus bandwidth). It adds "
        f"{result['all_reduce_exposed_ms']['median']:.3g} ms to the step, including waiting for other processes; "
        f"{result['all_reduce_overlapped']['median']:.0%} of it is hidden"
    )

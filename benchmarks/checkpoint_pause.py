"""Cost of a checkpoint: how long training waits for one, beside a step's time, and what it takes in memory.

python benchmarks/checkpoint_pause.py [--recipe R] [--saves N] [--folder DIR] [--SECTION.FIELD V]

torchrun --nproc_per_node N benchmarks/checkpoint_pause.py [--train.parallel fsdp]

Each turn measures steps alone, a checkpoint as training writes it (in the background, beside as many steps), and one
that training would wait for. Steps are on resident batches.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from environment import check_writable
from options import ModelOptions, default_options
from rich.console import Console
from step_modes import new_train_state, resident_batches, take_step
from synthetic_data import prepare_shards
from timing import forget_peak, paired_ratio, peak_gib, percentiles, ratio_text, timed

from iwm.compat import synchronize
from iwm.config import Config
from iwm.evaluation.result_table import ResultTable
from iwm.ranges import Range, check_ranges
from iwm.recipes import RECIPES
from iwm.training import checkpoint as checkpoints
from iwm.training.checkpoint import Checkpoint
from iwm.training.checkpoint_writer import CheckpointWriter
from iwm.training.distributed import init_distributed
from iwm.training.train_state import TrainState, checkpoint_parts, checkpoint_tensors
from shards.command_line import run_command

HOST = torch.device("cpu")
"""Device whose peak memory a checkpoint takes."""


@dataclass(frozen=True)
class CheckpointPauseOptions:
    """Pause of training for a checkpoint, and its memory."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: Annotated[str, tyro.conf.arg(metavar="|".join(RECIPES))]
    """Recipe. Default: iwm_b16_equi_18x384 on a GPU, else demo, with at most 256 images per step on each process."""
    shards: Path | None = None
    """Folder of shards (short for --data.shards). None: generate shards in data/benchmark."""
    saves: Annotated[int, Range(min=1)] = 5
    """Number of turns, each with two checkpoints."""
    steps: Annotated[int, Range(min=1)] = 10
    """Number of steps alone, and beside a checkpoint, in each turn."""
    folder: Path | None = None
    """Folder to write to, in the file system of your runs. None: the system's temporary folder."""
    json: Path | None = None
    """File for the results (JSON)."""


class Turn(NamedTuple):
    """Measurements of one turn on one process (seconds, except for the last)."""

    step: float
    """Median step without a checkpoint."""
    pause: float
    """Pause of training for a checkpoint that is written in the background."""
    collect: float
    """Part of the pause in which the state is collected, the pipeline's state among it."""
    step_beside: float
    """Median step while, for a part of the time, a checkpoint is written."""
    write: float
    """Time from a save to the end of its write, without steps beside it: the pause of a training that waits for it."""
    host_gib: float
    """Peak of host memory while that checkpoint is made and written, above the memory before (GiB)."""


def measure_turn(state: TrainState, writer: CheckpointWriter, batches: Sequence[Any], steps: int) -> Turn:
    """Measure one turn. All processes must call this. Raises OSError where a checkpoint cannot be written."""
    device, collecting = state.dist.device, 0.0

    def collect() -> tuple[dict[str, Any], Any]:
        nonlocal collecting
        began = time.perf_counter()
        parts = checkpoint_parts(state)
        collecting = time.perf_counter() - began
        return parts

    def take_steps() -> float:
        return percentiles(timed(lambda: take_step(state, batches), steps, device))["median"]

    def finish() -> None:
        if (error := writer.finish()) is not None:
            raise error
        state.dist.all_gather("written")

    alone = take_steps()
    synchronize(device)
    pause = writer.save(collect)
    beside = take_steps()
    finish()
    forget_peak(HOST)
    before, began = peak_gib(HOST), time.perf_counter()
    writer.save(collect)
    finish()
    written = time.perf_counter() - began
    return Turn(alone, pause.seconds(), collecting, beside, written, peak_gib(HOST) - before)


def measure(options: CheckpointPauseOptions, console: Console) -> dict[str, Any]:
    """Measure all turns, print a table on the first process, and return the results.

    Raises BenchmarkError, ConfigError, ShardError, and OSError where a checkpoint cannot be written.
    """
    options.config.check()
    check_ranges(options)
    config = options.config
    with init_distributed(config.train) as dist, TemporaryDirectory(dir=options.folder) as folder:
        console.quiet = not dist.is_main
        prepare_shards(config.data, dist, console)
        state = new_train_state(config, dist)
        batches, run = resident_batches(state), Path(folder)

        def write(content: dict[str, Any], loaders: list[Any]) -> None:
            checkpoints.save_checkpoint(run, Checkpoint.gathered(content, loaders))
            checkpoints.prune_checkpoints(run, 1, None)

        with CheckpointWriter(dist, write, console.print) as writer:
            writer.reserve(checkpoint_tensors(state))
            # The optimiser has its moments after the first step.
            measure_turn(state, writer, batches, steps=3)
            turns = []
            for number in range(options.saves):
                with console.status(f"turn {number + 1} of {options.saves}"):
                    turns.append(measure_turn(state, writer, batches, options.steps))
            size = sum(path.stat().st_size for path in checkpoints.list_checkpoints(run))
            ranks = [[Turn(*turn) for turn in rank] for rank in dist.all_gather([tuple(turn) for turn in turns])]
            copies = dist.all_gather(writer.host_bytes)
    return {
        "recipe": options.recipe,
        "processes": dist.size,
        "parallel": config.train.parallel if dist.size > 1 else None,
        "device": dist.device.type,
        "images_per_process": state.micro_batch * state.accumulation,
        "file_bytes": size,
        "copy_bytes": copies,
        **summarised(ranks),
    }


def summarised(ranks: list[list[Turn]]) -> dict[str, Any]:
    """Summarise the turns of all ranks. Training waits for the slowest rank, so times are the largest over ranks."""
    slowest = [Turn(*(max(values) for values in zip(*turn, strict=True))) for turn in zip(*ranks, strict=True)]
    steps = [turn.step for turn in slowest]
    return {
        **{
            f"{name}_ms": percentiles([1e3 * getattr(turn, name) for turn in slowest])
            for name in ("step", "pause", "collect", "step_beside", "write")
        },
        "pause_in_steps": paired_ratio([turn.pause for turn in slowest], steps),
        "write_in_steps": paired_ratio([turn.write for turn in slowest], steps),
        "step_beside_in_steps": paired_ratio([turn.step_beside for turn in slowest], steps),
        "host_gib": [percentiles([turn.host_gib for turn in rank])["median"] for rank in ranks],
    }


def show(result: dict[str, Any], console: Console) -> None:
    several = f"{result['processes']} processes, {result['parallel']}" if result["parallel"] else "one process"
    rows = []
    for name, meaning in (
        ("step", "step"),
        ("pause", "pause for a checkpoint"),
        ("collect", "… of which collecting the state"),
        ("step_beside", "step while one is written"),
        ("write", "checkpoint that training waits for"),
    ):
        cells = (f"{result[f'{name}_ms'][column]:,.4g}" for column in ("median", "p10", "p90"))
        rows.append([meaning, *cells, ratio_text(result.get(f"{name}_in_steps"))])
    title = (
        f"{result['recipe']}, {several}, {result['images_per_process']} images each, {result['device']}; "
        f"checkpoint of {result['file_bytes'] / 1e9:.2f} GB"
    )
    console.print(ResultTable(title, ["", "ms", "p10", "p90", "in steps (range)"], rows))
    copies = ", ".join(f"{size / 2**30:.3f}" for size in result["copy_bytes"])
    peaks = ", ".join(f"{gib:.3f}" for gib in result["host_gib"])
    console.print(
        f"Host memory by rank: copies {copies} GiB, always held; while a checkpoint is written {peaks} GiB more"
    )


def main() -> None:
    base = default_options(ModelOptions, sys.argv[1:])
    default = CheckpointPauseOptions(base.config, recipe=base.recipe, shards=base.shards)
    options = tyro.cli(
        CheckpointPauseOptions, default=default, description=__doc__, prog="benchmarks/checkpoint_pause.py"
    )
    if options.json is not None:
        check_writable("--json", options.json)
    console = Console()
    result = measure(options, console)
    show(result, console)
    if options.json is not None and not console.quiet:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/checkpoint_pause.py"))

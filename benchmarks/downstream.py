"""Mode `downstream`: training rate and memory of each protocol at its own settings, and of its pipeline alone.

Every protocol is trained for a few steps by the user's command, iwm/evaluate.py, in its own process, on an untrained
model of the recipe: rates do not depend on parameters. Its pipeline is then measured alone with the protocol's crops,
on the model's device and, beside a GPU, on CPU cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from environment import BenchmarkError, lookup
from options import GPU_RECIPE, DownstreamRateOptions, settings_of
from rich.console import Console
from synthetic_data import labelled_shards
from timing import measure

from dali_pipelines.crops import CropSettings, SegmentationCrops
from dali_pipelines.loader import CropLoader, SegmentationLoader
from iwm.compat import synchronize
from iwm.config import Config
from iwm.downstream.registry import PROTOCOLS
from iwm.downstream.settings import TrainSettings, sized_crops
from iwm.evaluation.result_table import ResultTable
from iwm.models.world_model import WorldModel
from iwm.ranges import check_ranges
from iwm.recipes import RECIPES
from iwm.training.checkpoint import Checkpoint, save_checkpoint, versions
from iwm.training.distributed import loader_threads
from iwm.training.runtime import select_device

WINDOWS = 3
"""Number of windows of a pipeline's measurement, of which the median counts."""


def run(options: DownstreamRateOptions, console: Console) -> dict[str, Any]:
    """Measure, print a table, and return the results. Raises BenchmarkError and ShardError."""
    check_ranges(options)
    protocols = options.protocols or tuple(PROTOCOLS)
    for name in protocols:
        lookup("--protocols", name, PROTOCOLS)
    device = select_device(options.device, "--device")
    recipe = options.recipe or (GPU_RECIPE if device.type == "cuda" else "demo")
    config = lookup("--recipe", recipe, RECIPES)()
    shards = options.shards or labelled_shards(console)
    rows: dict[str, dict[str, Any]] = {}
    result = {
        "recipe": recipe,
        "settings": settings_of(options),
        "shards": str(shards),
        "device": device.type,
        "protocols": rows,
    }
    with TemporaryDirectory() as folder:
        checkpoint = untrained_run(Path(folder), config)
        for name in protocols:
            with console.status(f"{name}: training"):
                row = trained(name, checkpoint, shards, options)
            with console.status(f"{name}: its pipeline"):
                row["pipeline"] = pipelines(name, config, shards, row["images_per_pass"], device, options)
            rows[name] = row
            # Protocols take minutes each: what is measured is kept if the next one fails or is interrupted.
            console.print(f"{name}: {row['images_per_second']:,.0f} images/s", highlight=False)
            if options.json is not None:
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result, console)
    return result


def untrained_run(folder: Path, config: Config) -> Path:
    """Write a run's folder with a checkpoint of a new model, and return it."""
    torch.manual_seed(0)
    model = WorldModel(config).state_dict()
    save_checkpoint(folder, Checkpoint(config, 0, 0, 0, model, optimizer={}, rng={}, loader={}, versions=versions()))
    return folder


def trained(name: str, run_dir: Path, shards: Path, options: DownstreamRateOptions) -> dict[str, Any]:
    """Train a protocol for a few steps; return its rate, data wait, images per pass and memory.

    The first half of the steps, which compile and settle, is not counted. Raises BenchmarkError where the command ends
    with an error.
    """
    output = run_dir / f"{name}.json"
    settings: TrainSettings = PROTOCOLS[name].settings(run_dir)
    words = [
        *("--checkpoint", run_dir, "--device", options.device, "--output", output),
        *("--data.shards", shards, "--data.train", options.train, "--data.split", options.val),
        *("--data.label", options.label, "--batch-size", min(settings.batch_size, options.batch_size)),
        *("--steps", options.steps, "--warmup-epochs", 0, "--validate-every", 1_000_000, "--log-every", 1),
    ]
    if settings.micro_batch_size is not None:
        words += ["--micro-batch-size", min(settings.micro_batch_size, options.batch_size)]
    if name == "multitask":
        words += ["--tasks", options.label, f"{shards}:{options.label}"]
    command = [sys.executable, "-m", "iwm.evaluate", name, *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise BenchmarkError(f"--protocols {name}: ended with code {done.returncode}: {' '.join(last)}")
    lines = [json.loads(line) for line in (run_dir / name / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "images_per_second" in line]
    counted = lines[len(lines) // 2 :]
    result = json.loads(output.read_text())
    return {
        "trials": len(result["trials"]),
        "images_per_pass": result["micro_batch_size"],
        "images_per_second": float(np.median([line["images_per_second"] for line in counted])),
        "data_wait": float(np.median([line["data_wait"] for line in counted])),
        "memory_gib": max(line["memory_gib"] for line in lines),
    }


class CropWork(NamedTuple):
    """A protocol's pipeline that is measured."""

    shards: Path
    split: str
    label: str
    crops: CropSettings | SegmentationCrops
    batch_size: int
    device: str
    threads: int


def pipelines(
    name: str, config: Config, shards: Path, batch_size: int, device: torch.device, options: DownstreamRateOptions
) -> dict[str, float]:
    """Return the images/s of a protocol's pipeline alone, by device."""
    settings: Any = PROTOCOLS[name].settings(Path("unused"))
    crops, threads = sized_crops(settings.crops, config.views.size), loader_threads(device, 1)
    rates = {}
    for kind in dict.fromkeys((device.type, "cpu")):
        work = CropWork(shards, options.train, options.label, crops, batch_size, kind, threads)
        windows = measure(partial(batches, work), None, options.seconds, WINDOWS)
        rates[kind] = float(np.median([window.wall for window in windows]))
    return rates


def batches(work: CropWork) -> Generator[int, None, None]:
    """Yield the number of images of each batch when it is ready, endlessly."""
    loading: dict[str, Any] = {"seed": 0, "device": work.device, "num_threads": work.threads}
    loader = (
        SegmentationLoader(work.shards, work.split, work.crops, batch_size=work.batch_size, **loading)
        if isinstance(work.crops, SegmentationCrops)
        else CropLoader(work.shards, work.split, work.crops, batch_size=work.batch_size, label=work.label, **loading)
    )
    for batch in loader:
        synchronize(torch.device(work.device))
        yield len(batch.images)


def show(result: dict[str, Any], console: Console) -> None:
    gpu = result["device"] == "cuda"
    columns = ["protocol", "trials", "images per pass", "images/s", "data wait", "GiB"]
    columns += ["pipeline alone, GPU", "on CPU cores"] if gpu else ["pipeline alone"]
    rows = [
        [
            name,
            str(row["trials"]),
            str(row["images_per_pass"]),
            f"{row['images_per_second']:,.0f}",
            f"{100 * row['data_wait']:.0f}%",
            f"{row['memory_gib']:.2f}",
            *(f"{rate:,.0f}" for rate in row["pipeline"].values()),
        ]
        for name, row in result["protocols"].items()
    ]
    title = f"downstream protocols, encoder of {result['recipe']}, on {result['device']}"
    console.print(ResultTable(title, columns, rows))
    console.print(
        "images/s: of training; pipeline: decoding, crops and augmentations alone, for as many images per batch"
    )

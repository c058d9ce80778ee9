"""Is it right? The pipeline's views against the torch replay of the written parameters, and a GPU's against the CPU's.

python benchmarks/parity.py [--device cuda] [--shards DIR] [--json FILE]

Differences are in grey levels (0 to 255), over all pixels of a batch. `make test` holds the means below 1.
"""

from __future__ import annotations

import dali_pipelines.command  # noqa: F401  # isort: skip  # first: it ends the command where DALI is missing

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from generated import generated_shards
from jaxtyping import UInt8
from machine import machine
from mistakes import BenchmarkError, make_room_for
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dali_pipelines import replay
from dali_pipelines.augmentation import NO_COLOUR, ONE_OP, SOURCE, ColourDefinition, Photometric, Views
from dali_pipelines.loader import Batch, ViewLoader
from shards.manifest import ShardError

DEFINITIONS: tuple[ColourDefinition, ...] = ("linear", "torchvision")


@dataclass(frozen=True)
class Options:
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the pipeline works that is looked at."""
    shards: Path | None = None
    """Folder of shards; None: generated ones, in data/benchmark."""
    split: str = "train"
    """Split of the shards."""
    images: int = 256
    """Images of a batch."""
    size: int = 224
    """Side of the views in pixels."""
    json: Path | None = None
    """File to write everything to."""


def difference(one: UInt8[Tensor, "b h w 3"], other: UInt8[Tensor, "b h w 3"]) -> dict[str, float]:
    """Mean and largest absolute difference in grey levels, and PSNR in dB (infinite where there is none)."""
    apart = (one.float() - other.float()).abs()
    mean_square = apart.square().mean()
    return {
        "mean": apart.mean().item(),
        "max": apart.max().item(),
        "psnr": (10 * torch.log10(255**2 / mean_square)).item(),
    }


def one_batch(folder: Path, options: Options, source: Photometric, colour: ColourDefinition, device: str) -> Batch:
    """The target is left without colour: it is what the source was made from."""
    views = Views(size=options.size, source=source, target=NO_COLOUR, colour=colour)
    loader = ViewLoader(folder, options.split, views, batch_size=options.images, seed=0, device=device)
    batch = next(loader)
    return Batch(batch.source.clone(), batch.target.clone(), batch.params.clone(), None, batch.keys)


def measured(options: Options, folder: Path) -> list[dict[str, Any]]:
    """A row per definition and op: the pipeline against replay and, on a GPU, against the CPU's pipeline."""
    rows = []
    for colour in DEFINITIONS:
        for op, spec in {"none (decode, crop, resize)": NO_COLOUR, **ONE_OP, "all, as in A.1": Photometric()}.items():
            made = one_batch(folder, options, spec, colour, options.device)
            again = replay.photometric(made.target, made.params[:, SOURCE], colour)
            row: dict[str, Any] = {"colour": colour, "op": op, "replay": difference(made.source, again)}
            if options.device == "cuda":
                there = one_batch(folder, options, spec, colour, "cpu")
                if not torch.equal(there.params, made.params.cpu()):
                    raise BenchmarkError(f"{op}: CPU and GPU drew other numbers from one seed; nothing to compare")
                row["cpu"] = difference(made.source.cpu(), there.source)
            rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], options: Options, console: Console) -> None:
    table = Table(title=f"views of {options.size} px on {options.device}, {options.images} images: grey levels")
    table.add_column("colour")
    table.add_column("op")
    others = [name for name in ("replay", "cpu") if name in rows[0]]
    for name in others:
        for column in ("mean", "max", "dB"):
            table.add_column(f"{name} {column}", justify="right")
    for row in rows:
        cells = [(f"{d['mean']:.3f}", f"{d['max']:.0f}", f"{d['psnr']:.1f}") for d in (row[name] for name in others)]
        table.add_row(row["colour"], row["op"], *(cell for three in cells for cell in three))
    console.print(table)


def main() -> int:
    options, console = tyro.cli(Options, description=__doc__, prog="benchmarks/parity.py"), Console()
    try:
        if options.json is not None:
            make_room_for("--json", options.json)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise BenchmarkError("--device cuda: this machine has no usable GPU; say --device cpu")
        folder = options.shards or generated_shards(console)
        rows = measured(options, folder)
    except (BenchmarkError, ShardError) as error:
        print(f"benchmarks/parity.py: {error}", file=sys.stderr)
        return 1
    show(rows, options, console)
    if options.json is not None:
        result = {"rows": rows, "settings": replace(options, json=None).__dict__, "machine": machine()}
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
        console.print(f"written to {options.json}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

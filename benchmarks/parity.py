"""Parity of the pipeline's views with the torch replay of their parameters, of GPU with CPU, and of Triton's kernels.

python benchmarks/parity.py [--definitions] [--device cuda] [--shards DIR] [--json FILE]

Differences are in grey levels (0 to 255), over all pixels of a batch. `make test` checks that
the mean difference of each op from the replay is below 1. Columns `triton`, on a GPU: the views
of data.backend triton against the replay. `--definitions` compares the two definitions of the jitter
(views.jitter_impl) with one another instead, beside the change that each makes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import tyro
from environment import BenchmarkError, check_writable, environment_info
from jaxtyping import UInt8
from rich.console import Console
from synthetic_data import generated_shards
from torch import Tensor

from dali_pipelines import replay
from dali_pipelines.augmentations import (
    JITTER_OPS,
    NO_PHOTOMETRIC,
    SINGLE_OP,
    SOURCE,
    JitterImpl,
    PhotometricConfig,
    ViewBackend,
)
from dali_pipelines.photometric_kernels import missing_ops
from dali_pipelines.views import SCENARIOS, Views
from iwm.compat import HAS_TRITON
from iwm.evaluation.result_table import ResultTable
from iwm.training.runtime import select_device
from shards.command_line import run_command

if TYPE_CHECKING:
    from dali_pipelines.loader import ViewBatch


@dataclass(frozen=True)
class ParityOptions:
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of the tested pipeline."""
    shards: Path | None = None
    """Folder of shards. None: generated shards in data/benchmark."""
    split: str = "train"
    """Split of the shards."""
    images: int = 256
    """Batch size (images)."""
    size: int = 224
    """Side of the views (pixels)."""
    definitions: bool = False
    """Compare the definitions `linear` and `torchvision` of the jitter, on the same images and parameters."""
    json: Path | None = None
    """File for all results (JSON)."""


def difference(one: UInt8[Tensor, "b h w 3"], other: UInt8[Tensor, "b h w 3"]) -> dict[str, float]:
    """Return mean and largest absolute difference (grey levels) and PSNR (dB; infinite for equal images)."""
    apart = (one.float() - other.float()).abs()
    mean_square = apart.square().mean()
    return {
        "mean": apart.mean().item(),
        "max": apart.max().item(),
        "psnr": (10 * torch.log10(255**2 / mean_square)).item(),
    }


def one_batch(
    folder: Path,
    options: ParityOptions,
    source: PhotometricConfig,
    colour: JitterImpl,
    device: str,
    backend: ViewBackend | None = None,
) -> ViewBatch:
    """Return one batch whose target has no colour augmentation, so that it is the input of the source's."""
    from dali_pipelines.loader import ViewLoader  # not at the top: run_command reports a missing DALI

    views = Views(size=options.size, source=source, target=NO_PHOTOMETRIC, jitter_impl=colour)
    loader = ViewLoader(folder, options.split, views, batch_size=options.images, seed=0, device=device, backend=backend)
    return next(loader).clone()


def measured(options: ParityOptions, folder: Path, triton: bool) -> list[dict[str, Any]]:
    """Return a row per jitter implementation and op: the pipeline against the replay and, on a GPU, against the CPU.

    triton: also compare the views of backend `triton` with the replay, of ops that it has.
    """

    def from_replay(made: ViewBatch, colour: JitterImpl) -> dict[str, float]:
        return difference(made.source, replay.apply_photometric(made.target, made.params[:, SOURCE], colour))

    rows = []
    for colour in get_args(JitterImpl):
        for op, spec in {
            "none (decode, crop, resize)": NO_PHOTOMETRIC,
            **SINGLE_OP,
            "all, as in A.1": PhotometricConfig(),
        }.items():
            made = one_batch(folder, options, spec, colour, options.device)
            row: dict[str, Any] = {"colour": colour, "op": op, "replay": from_replay(made, colour)}
            others: dict[str, ViewBatch] = {}
            if options.device == "cuda":
                others["cpu"] = one_batch(folder, options, spec, colour, "cpu")
                row["cpu"] = difference(made.source.cpu(), others["cpu"].source)
            if triton and not missing_ops(Views(source=spec, target=NO_PHOTOMETRIC)):
                others["triton"] = one_batch(folder, options, spec, colour, options.device, "triton")
                row["triton"] = from_replay(others["triton"], colour)
            for name, other in others.items():
                if not torch.equal(other.params.cpu(), made.params.cpu()):
                    raise BenchmarkError(f"{op}: {name} sampled different parameters from the same seed")
            rows.append(row)
    return rows


def between_definitions(images: UInt8[Tensor, "b h w 3"]) -> list[dict[str, Any]]:
    """Return a row for each jitter op, each scenario's jitter and its whole source view.

    A row has the mean absolute difference between the definitions, and that of each from the unchanged image. Jitter
    alone is always applied, the source view with its probabilities.
    """
    jitters = {op.name: SINGLE_OP[op.name] for op in JITTER_OPS if op.in_paper}
    source_views = {"A.1": PhotometricConfig(), **{name: views.source for name, views in SCENARIOS.items()}}
    source_views = {name: spec for name, spec in source_views.items() if spec.jitter_probability > 0}
    for name in ("A.1", "strong"):
        jitters[f"jitter of {name}"] = replace(source_views[name].without_destructive(), jitter_probability=1.0)
    rows = []
    for name, spec in {**jitters, **{f"source view of {name}": spec for name, spec in source_views.items()}}.items():
        params = replay.sample_photometric(spec, len(images), torch.Generator().manual_seed(0)).to(images.device)
        linear, torchvision = (replay.apply_photometric(images, params, colour) for colour in get_args(JitterImpl))
        rows.append(
            {
                "op": name,
                "between": difference(linear, torchvision)["mean"],
                "linear": difference(linear, images)["mean"],
                "torchvision": difference(torchvision, images)["mean"],
            }
        )
    return rows


def show_definitions(rows: list[dict[str, Any]], options: ParityOptions, console: Console) -> None:
    title = f"definitions of the jitter, {options.images} images of {options.size} px: mean difference in grey levels"
    columns = ["op", "linear to torchvision", "linear to unchanged", "torchvision to unchanged"]
    cells = [[row["op"], *(f"{row[name]:.1f}" for name in ("between", "linear", "torchvision"))] for row in rows]
    console.print(ResultTable(title, columns, cells))


def show(rows: list[dict[str, Any]], options: ParityOptions, console: Console) -> None:
    others = [name for name in ("replay", "cpu", "triton") if name in rows[0]]
    columns = ["colour, op", *(f"{name} {column}" for name in others for column in ("mean", "max", "dB"))]
    table = []
    for row in rows:
        found = (row.get(name) for name in others)
        cells = [(f"{d['mean']:.3f}", f"{d['max']:.0f}", f"{d['psnr']:.1f}") if d else ("", "", "") for d in found]
        table.append([f"{row['colour']}, {row['op']}", *(cell for three in cells for cell in three)])
    title = f"views of {options.size} px on {options.device}, {options.images} images: grey levels"
    console.print(ResultTable(title, columns, table))


def main() -> None:
    options, console = tyro.cli(ParityOptions, description=__doc__, prog="benchmarks/parity.py"), Console()
    if options.json is not None:
        check_writable("--json", options.json)
    select_device(options.device, "--device")
    folder = options.shards or generated_shards(console)
    if options.definitions:
        views = one_batch(folder, options, NO_PHOTOMETRIC, "linear", options.device)
        rows = between_definitions(views.target)
        show_definitions(rows, options, console)
    else:
        rows = measured(options, folder, triton=options.device == "cuda" and HAS_TRITON)
        show(rows, options, console)
    if options.json is not None:
        result = {"rows": rows, "settings": replace(options, json=None).__dict__, "machine": environment_info()}
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
        console.print(f"written to {options.json}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/parity.py"))

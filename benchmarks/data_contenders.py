"""Who contends in mode `data`: the DALI pipeline, what it is measured against, and the limit of both."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from baselines import jpeg_decode, torchvision_loader
from generated import GENERATED
from mistakes import BenchmarkError
from pinned import Stream
from rich.console import Console
from tune_candidates import LoaderSetup, batches

from dali_pipelines.augmentation import Views
from shards.manifest import MANIFEST

Device = Literal["cpu", "cuda"]
Baseline = Literal["torchvision", "webdataset", "ffcv", "decode"]
DECODE = "JPEG decode alone"
"""Name of the limit in every table."""


class Work(NamedTuple):
    """What is done, the same for all contenders."""

    folder: Path
    split: str
    views: Views
    batch: int
    cores: int
    """Worker threads or processes."""


class Entrant(NamedTuple):
    """One contender; `same_work` where it makes both whole views, so that its rate is a rival's."""

    stream: Stream
    same_work: bool


def entrants(work: Work, device: str, baselines: tuple[Baseline, ...], console: Console) -> dict[str, Entrant]:
    """Contenders by name, `dali` first. Raises BenchmarkError where a baseline is not installed."""
    setup = LoaderSetup(work.folder, work.split, work.views, work.batch, torch.device(device), work.cores)
    chosen = {"dali": Entrant(partial(batches, setup, {}), True)}
    for baseline in baselines:
        if not installed(baseline):
            raise BenchmarkError(f"--baseline {baseline}: {how_to_install(baseline)}")
        chosen.update(BASELINES[baseline](work, console))
    return chosen


INSTALL: dict[Baseline, str] = {
    "webdataset": "'pip install webdataset'",
    "ffcv": "it is built from source: pkg-config, libopencv-dev and libturbojpeg0-dev (Debian's names), then "
    "'pip install ffcv'",
}
"""How baselines are installed that the benchmarks do not bring along; the package has the baseline's name."""


def installed(baseline: Baseline) -> bool:
    return baseline not in INSTALL or find_spec(baseline) is not None


def how_to_install(baseline: Baseline) -> str:
    return f"the package {baseline} is not installed here ({INSTALL[baseline]})"


def _torchvision(work: Work, console: Console) -> dict[str, Entrant]:
    folder, split, views, batch, cores = work
    variants: tuple[torchvision_loader.Variant, ...] = ("pil", "tensor")
    return {
        f"torchvision {variant}": Entrant(
            partial(torchvision_loader.batches, folder, split, views, variant, batch, cores), True
        )
        for variant in variants
    }


def _webdataset(work: Work, console: Console) -> dict[str, Entrant]:
    loader = importlib.import_module("baselines.webdataset_loader")
    return {"webdataset": Entrant(partial(loader.batches, *work), True)}


def _ffcv(work: Work, console: Console) -> dict[str, Entrant]:
    loader = importlib.import_module("baselines.ffcv_loader")
    shards = f"{work.split} of {(work.folder / MANIFEST).read_text()}"
    file = GENERATED / f"ffcv-{hashlib.sha256(shards.encode()).hexdigest()[:16]}.beton"
    if not file.exists():
        console.print(f"writing the same JPEGs as FFCV's dataset to {file}")
        loader.write_dataset(work.folder, work.split, file, work.cores)
    # What it lacks is colour: without any, it does all of the work.
    whole = all(
        spec.jitter_probability == 0 and not spec.destructive for spec in (work.views.source, work.views.target)
    )
    stream = partial(loader.batches, file, work.views, work.batch, work.cores)
    return {"ffcv" if whole else "ffcv, part of the jitter": Entrant(stream, whole)}


def _decode(work: Work, console: Console) -> dict[str, Entrant]:
    return {DECODE: Entrant(partial(jpeg_decode.batches, work.folder, work.split, work.batch, work.cores), False)}


BASELINES: dict[Baseline, Callable[[Work, Console], dict[str, Entrant]]] = {
    "torchvision": _torchvision,
    "webdataset": _webdataset,
    "ffcv": _ffcv,
    "decode": _decode,
}

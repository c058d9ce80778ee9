"""Rates for mode `tune`: of a candidate's pipeline, of the model, and of training with a pipeline.

A candidate's pipeline exists for one turn only. The others are measured by `throughput.py model` and `end-to-end` in
their own processes, which free the GPU at their end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from baselines.jpeg_decode import stored_images
from environment import BenchmarkError
from rich.console import Console
from simplejpeg import decode_jpeg_header

from dali_pipelines.augmentations import ViewBackend, Views
from dali_pipelines.decoder import GpuDecoder
from dali_pipelines.loader import ViewLoader
from iwm.compat import synchronize


class LoaderSetup(NamedTuple):
    """Data, views, batch size and device of a two-view loader that is measured."""

    folder: Path
    split: str
    views: Views
    batch_size: int
    device: torch.device
    cores: int
    """Number of CPU threads where the settings have no num_threads."""
    backend: ViewBackend | None = None
    """Backend of the pipeline; None: the device's."""


LoaderSettings = Mapping[str, int | float]
"""Values by the names of DataConfig's fields."""


def batches(work: LoaderSetup, settings: LoaderSettings) -> Generator[int, None, None]:
    """Yield the number of images of each batch when it is ready, endlessly. Closing the iterator frees the pipeline."""
    decoder = GpuDecoder(
        hw_decoder_load=settings.get("hw_decoder_load", GpuDecoder.hw_decoder_load),
        width_hint=int(settings.get("decoder_width_hint", GpuDecoder.width_hint)),
        height_hint=int(settings.get("decoder_height_hint", GpuDecoder.height_hint)),
    )
    loader = ViewLoader(
        work.folder,
        work.split,
        work.views,
        batch_size=work.batch_size,
        seed=0,
        backend=work.backend,
        device=work.device,
        num_threads=int(settings.get("num_threads", work.cores)),
        prefetch_queue_depth=int(settings.get("prefetch_queue_depth", 2)),
        decoder=decoder,
    )
    for batch in loader:
        synchronize(work.device)
        yield len(batch.source)


SETTLING = 6
"""Number of batches before each measurement, while the pipeline fills its queues."""


def rate(work: LoaderSetup, settings: LoaderSettings, seconds: float, pause: float) -> float:
    """Measure the images/s (wall time) of a newly built pipeline, with `pause` seconds between batches."""
    with closing(batches(work, settings)) as stream:
        for _ in range(SETTLING):
            next(stream)
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            time.sleep(pause)
            images += next(stream)
        return images / (time.perf_counter() - start)


def decoder_size_hint(folder: Path, split: str, images: int = 2000) -> tuple[int, int]:
    """Return the width and height that 99% of the images do not exceed (pixels), from the headers of `images` images.

    The decoder allocates memory for this size once; the rare larger image costs a reallocation.
    """
    stored = stored_images(folder, split)
    sides = [decode_jpeg_header(image.read())[:2] for image in stored[:: max(1, len(stored) // images)]]
    height, width = np.percentile(sides, 99, axis=0, method="inverted_cdf")
    return int(width), int(height)


BRIEF = ("--seconds", "5", "--repeats", "1", "--warmup", "10")
IN_TURNS = ("--seconds", "9", "--repeats", "3", "--warmup", "10")


def model_rate(recipe: str, work: LoaderSetup, console: Console) -> float:
    """Measure the images/s of one process's training steps on resident batches. Raises BenchmarkError on failure."""
    with console.status("the model's rate"):
        (rate,) = _step_rates("model", recipe, work, BRIEF)
    return rate


def training_rates(
    recipe: str, scenario: str | None, work: LoaderSetup, settings: LoaderSettings, console: Console
) -> list[float]:
    """Measure the images/s of training on one process with the pipeline of work.backend, a value per turn.

    Raises BenchmarkError on failure.
    """
    words = [word for name, value in settings.items() for word in (option(name), str(value))]
    words += [] if scenario is None else ["--scenario", scenario]
    with console.status(f"training with backend {work.backend}"):
        return _step_rates("end-to-end", recipe, work, (*IN_TURNS, "--data.backend", str(work.backend), *words))


def option(name: str) -> str:
    """Return the option of iwm/train.py for a field of DataConfig."""
    return f"--data.{name.replace('_', '-')}"


def _step_rates(mode: str, recipe: str, work: LoaderSetup, words: Sequence[str]) -> list[float]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        data = ("--shards", work.folder, "--data.train", work.split, "--data.global-batch-size", work.batch_size)
        command = (Path(__file__).with_name("throughput.py"), mode, "--recipe", recipe, *data, *words, "--json", file)
        done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise BenchmarkError(
                f"--recipe {recipe}: the rate of mode {mode} could not be measured (code {done.returncode}, see "
                "above); set the model's with --model-rate, or leave a backend out with --backends"
            )
        return [float(rate) for rate in json.loads(file.read_text())["modes"][mode]["turns"]]

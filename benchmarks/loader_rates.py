"""Rates for mode `tune`: of a candidate's pipeline alone, and of training with each candidate's pipeline."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from baselines.jpeg_decode import stored_images
from options import TuneOptions
from rich.console import Console
from simplejpeg import decode_jpeg_header
from step_modes import cooldown_steps, measure_end_to_end, measure_model, new_train_state, resident_batches
from timing import Measured, StepTimings, interleave

from dali_pipelines.loader import ViewLoader
from dali_pipelines.views import Views
from iwm.compat import synchronize
from iwm.config import DataConfig
from iwm.recipes import RECIPES
from iwm.training.distributed import init_distributed
from iwm.training.runtime import select_backend


class LoaderSetup(NamedTuple):
    """Data, views, batch size and device of a two-view loader that is measured."""

    folder: Path
    split: str
    views: Views
    batch_size: int
    device: torch.device
    cores: int
    """Number of CPU threads where the settings have no num_threads."""


LoaderSettings = Mapping[str, Any]
"""Values by the names of DataConfig's fields."""


def open_loader(work: LoaderSetup, settings: LoaderSettings) -> ViewLoader:
    """Return a newly built pipeline. Settings that are not given have their defaults, and num_threads is work.cores."""
    data = replace(DataConfig(), **{"num_threads": work.cores, **settings})
    return ViewLoader(
        work.folder,
        work.split,
        work.views,
        batch_size=work.batch_size,
        seed=0,
        backend=select_backend(data.backend, work.device, work.views, "data.backend"),
        device=work.device,
        num_threads=data.num_threads,
        prefetch_queue_depth=data.prefetch_queue_depth,
        decoder=data.decoder,
    )


def batches(work: LoaderSetup, settings: LoaderSettings) -> Generator[int, None, None]:
    """Yield the number of images of each batch when it is ready, endlessly. Closing the iterator frees the pipeline."""
    for batch in open_loader(work, settings):
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


WARMUP_STEPS = 6
"""Number of training steps before the first measurement. They include compilation and the capture of a CUDA graph."""


def training_rates(
    recipe: str, options: TuneOptions, work: LoaderSetup, candidates: Mapping[str, LoaderSettings], console: Console
) -> dict[str, list[float]]:
    """Measure the images/s of training on one process with each candidate's pipeline, a value per turn.

    The pipelines feed the same training state in turns, and exist at the same time; those that wait are idle.
    """
    config = replace(RECIPES[recipe](), views=work.views)
    data = replace(
        config.data, shards=str(work.folder), train=work.split, val=None, global_batch_size=work.batch_size,
        micro_batch_size=None,
    )  # fmt: skip
    with init_distributed(config.train) as dist:
        state = new_train_state(replace(config, data=data), dist)
        with console.status("warming up the model"):
            measure_model(state, resident_batches(state), WARMUP_STEPS)

        def train(loader: ViewLoader, steps: int) -> StepTimings:
            state.loader = loader
            return measure_end_to_end(state, steps)

        measured = {
            name: Measured(partial(train, open_loader(work, settings)), work.batch_size)
            for name, settings in candidates.items()
        }
        with console.status("") as status:
            turns = interleave(
                measured,
                dist,
                seconds=options.seconds * options.repeats,
                repeats=options.repeats,
                settling=cooldown_steps(state),
                between=lambda: None,
                status=status.update,
                report=partial(console.print, highlight=False),
            )
    return {name: [turn.images_per_second for turn in windows] for name, windows in turns.items()}

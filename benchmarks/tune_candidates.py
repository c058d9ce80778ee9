"""The candidates of mode `tune`, each measured with a pipeline that exists for that turn alone."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from baselines.stored import places
from simplejpeg import decode_jpeg_header

from dali_pipelines.augmentation import Views
from dali_pipelines.decoder import GpuDecoder
from dali_pipelines.loader import ViewLoader


class LoaderSetup(NamedTuple):
    """Data, views, batch size and device of a two-view loader that is measured."""

    folder: Path
    split: str
    views: Views
    batch: int
    device: torch.device
    cores: int
    """CPU threads where the settings name none."""


Settings = Mapping[str, int | float]
"""Values by the names of iwm.training.tuned.SETTINGS."""


def batches(work: LoaderSetup, settings: Settings) -> Generator[int, None, None]:
    """Endless: the number of images of each batch, once it is there. Closing the iterator frees the pipeline."""
    decoder = GpuDecoder(
        hw_load=settings.get("hw_decoder_load", GpuDecoder.hw_load),
        width_hint=int(settings.get("decoder_width_hint", GpuDecoder.width_hint)),
        height_hint=int(settings.get("decoder_height_hint", GpuDecoder.height_hint)),
    )
    loader = ViewLoader(
        work.folder,
        work.split,
        work.views,
        batch_size=work.batch,
        seed=0,
        device=work.device,
        threads=int(settings.get("threads", work.cores)),
        prefetch=int(settings.get("prefetch", 2)),
        decoder=decoder,
    )
    for batch in loader:
        if work.device.type == "cuda":
            torch.cuda.synchronize(work.device)
        yield len(batch.source)


SETTLING = 6
"""Batches before each measurement: those of a pipeline that is still filling its queues do not count."""


def rate(work: LoaderSetup, settings: Settings, seconds: float, pause: float) -> float:
    """Images/s by the clock of a newly built pipeline, with `pause` seconds between batches."""
    with closing(batches(work, settings)) as stream:
        for _ in range(SETTLING):
            next(stream)
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            time.sleep(pause)
            images += next(stream)
        return images / (time.perf_counter() - start)


def usual_sides(folder: Path, split: str, images: int = 2000) -> tuple[int, int]:
    """Width and height in pixels that 99% of the images do not exceed, each; read from the headers of so many images.

    Memory is held for this size from the beginning to the end; the rare larger image costs a reallocation.
    """
    stored = places(folder, split)
    sides = [decode_jpeg_header(image.read())[:2] for image in stored[:: max(1, len(stored) // images)]]
    height, width = np.percentile(sides, 99, axis=0, method="inverted_cdf")
    return int(width), int(height)

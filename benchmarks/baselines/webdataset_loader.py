"""webdataset baseline: the same two views from the same tars, written as in its documentation.

Tars are sampled with replacement, read sequentially and shuffled in a buffer. Pillow decodes, and each worker makes
whole batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import webdataset as wds
from baselines.torchvision_loader import TwoViewTransforms, one_thread

from dali_pipelines.views import Views
from shards.format import load_manifest


def dataset(folder: Path, split: str, views: Views, batch_size: int) -> Any:
    """Return an endless dataset of batches of source and target, uint8 [B, 3, size, size] each."""
    tars = [str(folder / shard.name) for shard in load_manifest(folder, split).shards]
    return (
        wds.WebDataset(tars, resampled=True, shardshuffle=False, nodesplitter=None)
        .shuffle(1000)
        .decode("pil", only=["jpg"])
        .to_tuple("jpg")
        .map_tuple(TwoViewTransforms(views, "pil"))
        .map(itemgetter(0))
        .batched(batch_size, partial=False)
    )


def batches(folder: Path, split: str, views: Views, batch_size: int, workers: int) -> Iterator[int]:
    """Yield the number of images of each batch when it is ready, endlessly."""
    loader = wds.WebLoader(
        dataset(folder, split, views, batch_size), batch_size=None, num_workers=workers, worker_init_fn=one_thread
    )
    for source, _ in loader:
        yield len(source)

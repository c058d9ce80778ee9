"""The same two views by the webdataset package and a DataLoader, from the same tars, the way its documentation has it.

Tars are drawn with replacement, read from front to back and shuffled in a buffer; Pillow decodes; a worker makes whole
batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import webdataset as wds
from baselines.torchvision_loader import TwoViewTransforms, one_thread

from dali_pipelines.augmentation import Views
from shards.manifest import load_manifest


def dataset(folder: Path, split: str, views: Views, batch_size: int) -> Any:
    """Endless batches of source and target, uint8 [B, 3, size, size] each."""
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
    """Endless: the number of images of each batch, once it is there."""
    loader = wds.WebLoader(
        dataset(folder, split, views, batch_size), batch_size=None, num_workers=workers, worker_init_fn=one_thread
    )
    for source, _ in loader:
        yield len(source)

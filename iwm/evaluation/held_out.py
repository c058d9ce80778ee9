"""Images of a split as clean views, in the order of its shards: the first ones, or those of given keys.

Shards are shuffled when they are made, so the first are as good as any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from dali_pipelines.loader import ValidationBatch, ValidationLoader
from iwm.config import ConfigError

BATCH = 64
"""Images read at once."""


def batches(
    folder: Path,
    split: str,
    *,
    size: int,
    device: torch.device,
    most: int | None = None,
    label: str | None = None,
) -> Iterator[ValidationBatch]:
    """The first `most` images of a split (None: all), BATCH at a time, with the labels of column `label`.

    A batch lies in the pipeline's memory: copy what is kept. Raises ShardError as ValidationLoader does.
    """
    batch_size = BATCH if most is None else min(most, BATCH)
    left = most
    for batch in ValidationLoader(folder, split, size=size, batch_size=batch_size, device=device, label=label):
        images, labels, keys = batch
        yield (
            batch
            if left is None
            else ValidationBatch(images[:left], None if labels is None else labels[:left], keys[:left])
        )
        if left is not None:
            left -= len(images)
            if left <= 0:
                return


def first_images(
    folder: Path, split: str, *, size: int, most: int, device: torch.device
) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
    """At most `most` images of a split on `device`, size×size, with their sample keys."""
    images: list[Tensor] = []
    keys: list[str] = []
    for batch in batches(folder, split, size=size, most=most, device=device):
        images.append(batch.images.clone())
        keys += batch.keys
    return torch.cat(images), keys


def images_of(
    folder: Path, split: str, keys: Sequence[str], *, size: int, device: torch.device
) -> UInt8[Tensor, "b h w 3"]:
    """The images of these sample keys, in their order; reads the split until all are found.

    Raises ConfigError that names the keys which the split does not have.
    """
    found: dict[str, Tensor] = {}
    wanted = set(keys)
    for batch in batches(folder, split, size=size, device=device):
        found |= {key: image.clone() for key, image in zip(batch.keys, batch.images, strict=True) if key in wanted}
        if len(found) == len(wanted):
            return torch.stack([found[key] for key in keys])
    missing = ", ".join(key for key in keys if key not in found)
    raise ConfigError(f"--keys: split '{split}' of {folder} has no {missing}; its keys are the names in its tars")

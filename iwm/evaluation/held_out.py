"""The first held-out images of a split, as clean views."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from dali_pipelines.loader import ValidationLoader


def first_images(
    folder: Path, split: str, *, size: int, most: int, device: torch.device
) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
    """At most `most` images of a split on `device`, size×size, with their sample keys.

    Shards are shuffled when they are made, so the first are as good as any. Raises ShardError as ValidationLoader does.
    """
    images: list[Tensor] = []
    keys: list[str] = []
    for batch in ValidationLoader(folder, split, size=size, batch_size=min(most, 64), device=device):
        # A copy: the batch lies in the pipeline's memory, which is not to be held.
        images.append(batch.images.clone())
        keys += batch.keys
        if len(keys) >= most:
            break
    return torch.cat(images)[:most], keys[:most]

"""JPEG decoding alone with libjpeg-turbo: the limit of any loader that decodes on the CPU.

It also locates the single JPEGs inside the shards' tars.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import simplejpeg

from shards.format import load_manifest, parse_index


class StoredImage(NamedTuple):
    """Location of one JPEG inside a tar; `offset` and `size` in bytes."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the stored JPEG."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def stored_images(folder: Path, split: str) -> list[StoredImage]:
    """Return the location of every JPEG of a split from the shards' indexes, without scanning the tars."""
    return [
        StoredImage(folder / shard.name, entry.offset, entry.size)
        for shard in load_manifest(folder, split).shards
        for sample in parse_index((folder / shard.index).read_bytes(), folder / shard.index)
        for entry in sample
        if entry.component == "jpg"
    ]


def batches(folder: Path, split: str, batch_size: int, threads: int) -> Iterator[int]:
    """Yield the number of images of each batch when it is read and decoded, endlessly.

    Decoding releases the GIL, so threads are as fast as processes and need no transfer between processes.
    """
    images = cycle(stored_images(folder, split))
    with ThreadPoolExecutor(threads) as pool:
        while True:
            batch = list(islice(images, batch_size))
            yield sum(pool.map(decode, [batch[start::threads] for start in range(threads)]))


def decode(images: list[StoredImage]) -> int:
    """Decode images exactly as Pillow does (no fast DCT, no fast upsampling), and return their number."""
    for image in images:
        simplejpeg.decode_jpeg(image.read(), colorspace="RGB", fastdct=False, fastupsample=False)
    return len(images)

"""The limit of any loader that decodes on the CPU: JPEGs of the same tars through libjpeg-turbo, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import simplejpeg
from baselines.stored import Place, places


def batches(folder: Path, split: str, batch_size: int, threads: int) -> Iterator[int]:
    """Endless: the number of images of each batch, once they are read and decoded.

    Decoding releases Python's lock, so threads are as good as processes and need not hand anything over.
    """
    images = cycle(places(folder, split))
    with ThreadPoolExecutor(threads) as pool:
        while True:
            batch = list(islice(images, batch_size))
            yield sum(pool.map(decode, [batch[start::threads] for start in range(threads)]))


def decode(images: list[Place]) -> int:
    """Decode all of them, exactly as Pillow would (no fast DCT, no fast upsampling); how many there were."""
    for image in images:
        simplejpeg.decode_jpeg(image.read(), colorspace="RGB", fastdct=False, fastupsample=False)
    return len(images)

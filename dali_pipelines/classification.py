"""The plain pipeline of evaluation: whole images, centre crops, in order (paper, A.2)."""

from __future__ import annotations

import math

from dali_pipelines.dali import dali_math, fn, pipeline_def, types
from dali_pipelines.decoder import GpuDecoder
from dali_pipelines.photometric import Backend, DataNode
from dali_pipelines.reader import Source, decode, read


@pipeline_def(exec_dynamic=True)
def centre_crops(
    source: Source, size: int, *, backend: Backend, read_ahead: int, decoder: GpuDecoder
) -> tuple[DataNode, ...]:
    """Outputs: images (uint8 HWC, size×size), origin, and the label if one is read.

    Shorter side to ceil(size · 256 / 224), antialiased, then the middle: to the pixel as torchvision's Resize and
    CenterCrop, whose sides are rounded down and whose margins are rounded to even.
    """
    encoded = read(source, shuffle_buffer=0, seed=0, prefetch=read_ahead)
    sides = fn.peek_image_shape(encoded.jpeg, dtype=types.INT32)[:2]
    resized = sides * math.ceil(size * 256 / 224) // dali_math.min(sides[0], sides[1])
    image = decode(encoded.jpeg, backend, decoder)
    image = fn.resize(image, size=fn.cast(resized, dtype=types.FLOAT))
    surplus = resized - size
    margin = (surplus + surplus // 2 % 2) // 2
    image = fn.slice(image, start=margin, shape=[size, size], axes=[0, 1])
    outputs = (image, encoded.origin)
    return outputs if encoded.label is None else (*outputs, encoded.label)

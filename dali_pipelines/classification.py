"""The plain pipeline of evaluation: whole images, centre crops, in order (paper, A.2)."""

from __future__ import annotations

import math

from nvidia.dali import fn, pipeline_def

from dali_pipelines.photometric import Backend, DataNode
from dali_pipelines.reader import Source, decode, read


@pipeline_def(exec_dynamic=True)
def centre_crops(
    source: Source, size: int, *, backend: Backend, read_ahead: int, hw_decoder_load: float
) -> tuple[DataNode, ...]:
    """Outputs: images (uint8 HWC, size×size), origin, and the label if one is read."""
    encoded = read(source, shuffle_buffer=0, seed=0, prefetch=read_ahead)
    image = decode(encoded.jpeg, backend, hw_decoder_load)
    image = fn.resize(image, resize_shorter=float(math.ceil(size * 256 / 224)))
    image = fn.crop(image, crop=(size, size))
    outputs = (image, encoded.origin)
    return outputs if encoded.label is None else (*outputs, encoded.label)

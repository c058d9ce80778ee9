"""Geometry of a view as DALI operators: crop, resize and flip."""

from __future__ import annotations

from typing import NamedTuple

from dali_pipelines.crops import Interpolation
from dali_pipelines.dali import dali_math, fn, types
from dali_pipelines.decoder import Decoder
from dali_pipelines.pixels import Backend, DataNode, as_operand

INTERP_TYPES = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}


class Crop(NamedTuple):
    """Crop box and flip of a sample, in pixels of the decoded image."""

    start: DataNode
    """Top left corner (y, x), int64."""
    shape: DataNode
    """Size of the box (height, width), int64."""
    image_shape: DataNode
    """Size of the image (height, width, channels), int64."""
    flip: DataNode
    """True where the view is flipped horizontally, BOOL."""


def draw_crop(jpeg: DataNode, scale: tuple[float, float], ratio: tuple[float, float], flip_probability: float) -> Crop:
    """Sample box and flip like torchvision's RandomResizedCrop and RandomHorizontalFlip (paper, A.1).

    `scale`: range of the area as a share of the image, uniform. `ratio`: range of width / height, log-uniform. The
    position is uniform. Up to ten attempts are made.
    """
    image_shape = fn.peek_image_shape(jpeg)
    start, shape = fn.random_crop_generator(
        image_shape, random_area=list(scale), random_aspect_ratio=list(ratio), num_attempts=10
    )
    flip = fn.random.coin_flip(probability=flip_probability, dtype=types.BOOL)
    return Crop(start, shape, image_shape, flip)


def decode_crop(jpeg: DataNode, crop: Crop, backend: Backend, decoder: Decoder) -> DataNode:
    """Decode an image and crop the box: uint8 HWC.

    Crop before the resize, like torchvision: a resize of the box within its image would use pixels outside the box. On
    a CPU the decoder crops, which is bit-identical and a tenth faster. On a GPU that path of nvImageCodec can crash
    (its issue 55).
    """
    if backend == "cpu" or decoder.device == "cpu":
        box = fn.decoders.image_slice(jpeg, start=crop.start, shape=crop.shape, axes=[0, 1])
        return as_operand(box, backend)
    return fn.slice(decode_full(jpeg, backend, decoder), start=crop.start, shape=crop.shape, axes=[0, 1])


def resize_box(
    box: DataNode, crop: Crop, size: int, backend: Backend, interpolation: Interpolation = "linear"
) -> DataNode:
    """Resize to size×size with antialiasing, and flip where sampled: uint8 HWC. A flip reads the box from the right."""
    interp_type = INTERP_TYPES[interpolation]
    left = fn.cast(crop.flip, dtype=types.FLOAT)
    if backend == "gpu":
        start, end = fn.stack(0.0, left), fn.stack(1.0, 1.0 - left)
        return fn.resize(
            box,
            size=[size, size],
            roi_start=start,
            roi_end=end,
            roi_relative=True,
            interp_type=interp_type,
            minibatch_size=256,  # images per kernel launch; DALI's default is 32
        )
    columns = _resize_width(crop, size)
    end = fn.stack(1.0, left + (1.0 - 2.0 * left) * columns / float(size))
    wide = fn.stack(float(size), columns)
    start = fn.stack(0.0, left)
    image = fn.resize(box, size=wide, roi_start=start, roi_end=end, roi_relative=True, interp_type=interp_type)
    return fn.slice(image, start=[0], shape=[size], axes=[1])


def _resize_width(crop: Crop, size: int) -> DataNode:
    """Return the number of columns to resize a box to on a CPU, at least `size`. Columns beyond `size` are discarded.

    DALI resizes rows and columns one after the other. Columns last, with uint8 output, is twice as fast as columns
    first, but DALI's cost estimate (made for GPUs) begins with the axis that shrinks more. The additional columns make
    the rows shrink more, so that columns come last. The first `size` columns stay bit-identical except for a rounding
    difference in one of 100,000 values.
    """
    height, width = crop.shape[0], crop.shape[1]
    shrinks = fn.cast(height >= size, dtype=types.INT64)
    columns = dali_math.max(size, (width * size // height + 2) * shrinks)
    return fn.cast(columns, dtype=types.FLOAT)


def decode_full(jpeg: DataNode, backend: Backend, decoder: Decoder) -> DataNode:
    """Decode the whole image: uint8 HWC RGB, upright."""
    if backend == "cpu" or decoder.device == "cpu":
        return as_operand(fn.decoders.image(jpeg), backend)
    return fn.decoders.image(
        jpeg,
        device="mixed",
        hw_decoder_load=decoder.hw_decoder_load,
        preallocate_width_hint=decoder.width_hint,
        preallocate_height_hint=decoder.height_hint,
        jpeg_fancy_upsampling=True,
    )

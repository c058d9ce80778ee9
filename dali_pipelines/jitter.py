"""Brightness, contrast, saturation and hue of a view as a DALI graph, in both definitions (Views.jitter_impl).

Times in comments are milliseconds per 224² image on one CPU core with DALI 2.4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dali_pipelines.augmentations import FLOAT_TO_UINT8, JitterImpl, PhotometricConfig
from dali_pipelines.dali import dali_math, fn, types
from dali_pipelines.pixels import (
    TRUNCATE,
    Backend,
    DataNode,
    as_op_argument,
    as_operand,
    grey,
    mean_grey,
    permuted,
    to_float,
    to_uint8,
)


class SharedImage(NamedTuple):
    """Inputs that both views of a sample share, computed once. DALI omits those that no op uses."""

    image: DataNode
    """The resized crop, uint8 HWC."""
    mean_grey: DataNode
    """Mean luma (grey levels), a scalar in CPU memory."""
    planes: DataNode
    """The image as uint8 CHW, the layout of the colour ops on a CPU."""


def prepare(image: DataNode, backend: Backend) -> SharedImage:
    """Compute the inputs that both views share from the resized crop, uint8 HWC.

    On a GPU the mean grey, 4 bytes per image, returns to CPU memory, and a thread of DALI waits for it: operators take
    their arguments from there only. Brightness and contrast as arithmetic on the GPU would need no copy, but four
    kernels instead of one for each view, and float32 images between them (54 bytes per pixel instead of 6).
    """
    return SharedImage(image, as_op_argument(mean_grey(image, backend), backend), permuted(image, "CHW"))


def apply_jitter(
    shared: SharedImage, values: dict[str, DataNode], spec: PhotometricConfig, jitter_impl: JitterImpl, backend: Backend
) -> DataNode:
    """Apply the four ops to every sample and return the image, uint8 HWC. values: parameters by PHOTOMETRIC_FIELDS."""
    if jitter_impl == "torchvision":
        return _jitter_torchvision(shared.image, values, spec, backend)
    if backend == "cpu":
        return _jitter_on_planes(shared, values, spec)
    return _jitter_on_pixels(shared, values, spec)


def _jitter_on_planes(shared: SharedImage, values: dict[str, DataNode], spec: PhotometricConfig) -> DataNode:
    """Linear jitter on a CPU. The circulant matrix is applied as a filter over channels with wrap-around.

    Hue and saturation take 0.18 ms, color_twist 0.95 ms.
    """
    planes = _brightness_contrast(fn.reshape(shared.planes, shape=[3, -1, 1], layout="HWC"), shared, values, spec)
    if spec.saturation or spec.hue:
        same, after, before = _hue_saturation_weights(values)
        kernel = fn.reshape(fn.stack(before, same, after), shape=[3, 1])
        planes = fn.filter(fn.reshape(planes, shape=[3, -1], layout="HW"), kernel, border="wrap")
    return permuted(fn.reshape(planes, shape=shared.planes.shape()), "HWC")


def _jitter_on_pixels(shared: SharedImage, values: dict[str, DataNode], spec: PhotometricConfig) -> DataNode:
    """Linear jitter on a GPU, in two kernels without a change of layout."""
    image = _brightness_contrast(shared.image, shared, values, spec)
    if spec.saturation or spec.hue:
        same, after, before = _hue_saturation_weights(values)
        rows = [
            fn.stack(same, after, before),
            fn.stack(before, same, after),
            fn.stack(after, before, same),
        ]
        image = fn.coord_transform(image, M=fn.stack(*rows), dtype=types.UINT8)
    return image


def _brightness_contrast(
    image: DataNode, shared: SharedImage, values: dict[str, DataNode], spec: PhotometricConfig
) -> DataNode:
    """Compute brightness · (mean grey + contrast · (x - mean grey)), rounded to uint8: 0.05 ms (in float 0.35 ms)."""
    if not (spec.brightness or spec.contrast):
        return image
    return fn.brightness_contrast(
        image, brightness=values["brightness"], contrast=values["contrast"], contrast_center=shared.mean_grey
    )


def _hue_saturation_weights(values: dict[str, DataNode]) -> list[DataNode]:
    """Return the weights of a channel itself, the next and the previous channel, in the cycle R, G, B, R, ...

    Saturation scales the colour about the grey axis of RGB, and hue (turns) rotates it. The map is a circulant matrix,
    so three weights define it. It is closer to HSV than DALI's own hue, which rotates in YIQ (PSNR 26.9 against
    22.4 dB).
    """
    angles = (2 * math.pi * (values["hue"] + channel / 3) for channel in range(3))
    return [(1.0 + 2.0 * values["saturation"] * dali_math.cos(angle)) / 3.0 for angle in angles]


def _jitter_torchvision(
    image: DataNode, values: dict[str, DataNode], spec: PhotometricConfig, backend: Backend
) -> DataNode:
    """Apply torchvision's adjust_brightness, _contrast, _saturation and _hue, clamped and truncated after each."""
    if spec.brightness:
        image = fn.brightness_contrast(image, brightness=values["brightness"], brightness_shift=TRUNCATE)
    if spec.contrast:
        centre = as_op_argument(mean_grey(image, backend), backend)
        image = fn.brightness_contrast(
            image, contrast=values["contrast"], contrast_center=centre, brightness_shift=TRUNCATE
        )
    if spec.saturation:
        saturation = as_operand(values["saturation"], backend)
        image = to_uint8(saturation * image + (1.0 - saturation) * grey(image, channels=3, backend=backend))
    if spec.hue:
        image = _rotate_hue(image, as_operand(values["hue"], backend))
    return image


def _rotate_hue(image: DataNode, turns: DataNode) -> DataNode:
    """Shift the hue in HSV by `turns`; saturation and value stay. DALI's arithmetic is fastest on CHW planes."""
    planes = fn.cast(fn.transpose(image, perm=[2, 0, 1]), dtype=types.FLOAT)
    red, green, blue = planes[0], planes[1], planes[2]
    value = dali_math.max(dali_math.max(red, green), blue)
    lowest = dali_math.min(dali_math.min(red, green), blue)
    chroma = value - lowest
    is_red = to_float(red == value)
    is_green = to_float(green == value) * (1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    within = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    sixths = within / dali_math.max(chroma, 1.0) + 2.0 * is_green + 4.0 * is_blue + 6.0 * turns
    hue = sixths - 6.0 * dali_math.floor(sixths / 6.0)
    # Share of the chroma of each channel at this hue (0 to 6): all six sectors of HSV → RGB in one formula.
    shares = (dali_math.abs(hue - 3.0) - 1.0, 2.0 - dali_math.abs(hue - 2.0), 2.0 - dali_math.abs(hue - 4.0))
    turned = (lowest + chroma * dali_math.max(dali_math.min(share, 1.0), 0.0) for share in shares)
    return permuted(to_uint8(fn.stack(*turned, axis=0) * FLOAT_TO_UINT8), "HWC")

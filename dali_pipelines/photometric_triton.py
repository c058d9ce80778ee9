"""Triton kernels of the photometric ops of both views (photometric_kernels.py).

The maths is replay.py's, in float32 and without fused multiply-adds, so that each step rounds as there. Images are
uint8 [b, h, w, 3] with `pixels` = h · w; rows of `drawn` have the columns of augmentations.PARAMS, of which each view's
begin at `first` and `second`. A program processes one block of one image, so its parameters are scalars. Triton's
launcher overwrites arguments named `params`, `specialization` or `options`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from dali_pipelines import augmentations
from dali_pipelines.augmentations import PARAMS, PHOTOMETRIC_FIELDS, SOLARIZE_THRESHOLD

COLUMNS = tl.constexpr(len(PARAMS))
BRIGHTNESS = tl.constexpr(PHOTOMETRIC_FIELDS.index("brightness"))
CONTRAST = tl.constexpr(PHOTOMETRIC_FIELDS.index("contrast"))
SATURATION = tl.constexpr(PHOTOMETRIC_FIELDS.index("saturation"))
HUE = tl.constexpr(PHOTOMETRIC_FIELDS.index("hue"))
GRAYSCALE = tl.constexpr(PHOTOMETRIC_FIELDS.index("grayscale"))
BLUR_SIGMA = tl.constexpr(PHOTOMETRIC_FIELDS.index("blur_sigma"))
SOLARIZE = tl.constexpr(PHOTOMETRIC_FIELDS.index("solarize"))
THRESHOLD = tl.constexpr(SOLARIZE_THRESHOLD)
TURN = tl.constexpr(2 * math.pi)
FLOAT_TO_UINT8 = tl.constexpr(augmentations.FLOAT_TO_UINT8)
LUMA = tl.constexpr(augmentations.LUMA)
INTEGERS = tl.constexpr(1.5 * 2**23)
"""Float32 numbers of this size are integers: adding it to a grey level rounds to nearest, ties to even."""


@triton.jit
def _clamped(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _rounded(x):
    """Clamp to [0, 255] and round to the nearest integer, ties to even."""
    return (_clamped(x) + INTEGERS) - INTEGERS


@triton.jit
def _truncated(x):
    """Clamp to [0, 255] and round down."""
    return tl.math.floor(_clamped(x))


@triton.jit
def _luma(red, green, blue):
    return _rounded(LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)


@triton.jit
def _load_pixels(images, image, pixel, pixels: tl.constexpr):
    """Load the three channels of some pixels of an image as float32 grey levels, 0 beyond its `pixels` pixels."""
    at = images + image.to(tl.int64) * (3 * pixels) + 3 * pixel
    there = pixel < pixels
    red = tl.load(at, mask=there, other=0).to(tl.float32)
    green = tl.load(at + 1, mask=there, other=0).to(tl.float32)
    blue = tl.load(at + 2, mask=there, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def grey_sums_kernel(
    images, drawn, sums,
    first: tl.constexpr, second: tl.constexpr, linear: tl.constexpr,
    pixels: tl.constexpr, parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Write the sum of the luma of each part of each image: int32 [b, 2, parts], for both views. Grid (parts, b).

    linear: the luma is that of the image, so there is one sum, the first; otherwise that of the view after brightness.
    Sums of integers do not depend on their order.
    """
    image = tl.program_id(1)
    pixel = tl.program_id(0) * block + tl.arange(0, block)
    red, green, blue = _load_pixels(images, image, pixel, pixels)
    row = drawn + image * COLUMNS
    out = sums + image * (2 * parts) + tl.program_id(0)
    if linear:
        tl.store(out, tl.sum(_luma(red, green, blue).to(tl.int32), 0))
    else:
        for view in tl.static_range(2):
            factor = tl.load(row + (second if view else first) + BRIGHTNESS)
            luma = _luma(_truncated(factor * red), _truncated(factor * green), _truncated(factor * blue))
            tl.store(out + view * parts, tl.sum(luma.to(tl.int32), 0))


@triton.jit
def _mean_grey(sums, pixels: tl.constexpr, parts: tl.constexpr, slots: tl.constexpr):
    """Return the mean luma from the sums of an image's parts. slots: `parts`, rounded up to a power of two."""
    slot = tl.arange(0, slots)
    total = tl.sum(tl.load(sums + slot, mask=slot < parts, other=0).to(tl.int64), 0)
    return total.to(tl.float32) / pixels


@triton.jit
def _jitter_linear(red, green, blue, row, centre):
    brightness, contrast = tl.load(row + BRIGHTNESS), tl.load(row + CONTRAST)
    red = _rounded(brightness * (centre + contrast * (red - centre)))
    green = _rounded(brightness * (centre + contrast * (green - centre)))
    blue = _rounded(brightness * (centre + contrast * (blue - centre)))
    saturation, hue = tl.load(row + SATURATION), tl.load(row + HUE)
    same = (1 + 2 * saturation * tl.math.cos(hue * TURN)) / 3
    after = (1 + 2 * saturation * tl.math.cos((hue + 1 / 3) * TURN)) / 3
    before = (1 + 2 * saturation * tl.math.cos((hue + 2 / 3) * TURN)) / 3
    return (
        _rounded(same * red + after * green + before * blue),
        _rounded(before * red + same * green + after * blue),
        _rounded(after * red + before * green + same * blue),
    )


@triton.jit
def _jitter_torchvision(red, green, blue, row, centre):
    brightness, contrast = tl.load(row + BRIGHTNESS), tl.load(row + CONTRAST)
    red, green, blue = _truncated(brightness * red), _truncated(brightness * green), _truncated(brightness * blue)
    red = tl.where(contrast == 1, red, _truncated(centre + contrast * (red - centre)))
    green = tl.where(contrast == 1, green, _truncated(centre + contrast * (green - centre)))
    blue = tl.where(contrast == 1, blue, _truncated(centre + contrast * (blue - centre)))
    saturation, turns = tl.load(row + SATURATION), tl.load(row + HUE)
    rest = (1 - saturation) * _luma(red, green, blue)
    red = tl.where(saturation == 1, red, _truncated(saturation * red + rest))
    green = tl.where(saturation == 1, green, _truncated(saturation * green + rest))
    blue = tl.where(saturation == 1, blue, _truncated(saturation * blue + rest))

    value = tl.maximum(tl.maximum(red, green), blue)
    lowest = tl.minimum(tl.minimum(red, green), blue)
    chroma = value - lowest
    within = tl.where(red == value, green - blue, tl.where(green == value, blue - red, red - green))
    sector = tl.where(red == value, 0.0, tl.where(green == value, 2.0, 4.0))
    sixths = within / tl.maximum(chroma, 1.0) + sector + 6 * turns
    hue = sixths - 6 * tl.math.floor(sixths / 6)
    return (
        tl.where(turns == 0, red, _at_hue(tl.abs(hue - 3) - 1, lowest, chroma)),
        tl.where(turns == 0, green, _at_hue(2 - tl.abs(hue - 2), lowest, chroma)),
        tl.where(turns == 0, blue, _at_hue(2 - tl.abs(hue - 4), lowest, chroma)),
    )


@triton.jit
def _at_hue(share, lowest, chroma):
    """Return a channel with a share of the chroma; shares are clamped to [0, 1]."""
    return _truncated((lowest + chroma * tl.minimum(tl.maximum(share, 0.0), 1.0)) * FLOAT_TO_UINT8)


@triton.jit
def _after_blur(x, row):
    """Apply to a channel the ops that follow blur: solarize. No grey level reaches 256."""
    threshold = tl.where(tl.load(row + SOLARIZE) > 0, THRESHOLD, 256)
    return tl.where(x >= threshold, 255 - x, x)


@triton.jit
def views_kernel(
    images, drawn, sums, first_view, second_view,
    first: tl.constexpr, second: tl.constexpr, jitter: tl.constexpr, centred: tl.constexpr,
    pixels: tl.constexpr, parts: tl.constexpr, slots: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Write two views of each image, with all ops, but of those with blur only the ops before it. Grid (blocks, b).

    jitter: its implementation, or "none". centred: False where contrast is never applied; `sums` is then not read.
    """
    image = tl.program_id(1)
    pixel = tl.program_id(0) * block + tl.arange(0, block)
    pixel_red, pixel_green, pixel_blue = _load_pixels(images, image, pixel, pixels)
    there = pixel < pixels
    centre = 0.0
    if centred and jitter == "linear":
        centre = _mean_grey(sums + image * (2 * parts), pixels, parts, slots)
    for view in tl.static_range(2):
        row = drawn + image * COLUMNS + (second if view else first)
        red, green, blue = pixel_red, pixel_green, pixel_blue
        if jitter == "linear":
            red, green, blue = _jitter_linear(red, green, blue, row, centre)
        elif jitter == "torchvision":
            if centred:
                centre = _mean_grey(sums + (2 * image + view) * parts, pixels, parts, slots)
            red, green, blue = _jitter_torchvision(red, green, blue, row, centre)
        grey, luma = tl.load(row + GRAYSCALE) > 0, _luma(red, green, blue)
        red, green, blue = tl.where(grey, luma, red), tl.where(grey, luma, green), tl.where(grey, luma, blue)
        blurred = tl.load(row + BLUR_SIGMA) > 0
        at = (second_view if view else first_view) + image.to(tl.int64) * (3 * pixels) + 3 * pixel
        tl.store(at, tl.where(blurred, red, _after_blur(red, row)).to(tl.uint8), mask=there)
        tl.store(at + 1, tl.where(blurred, green, _after_blur(green, row)).to(tl.uint8), mask=there)
        tl.store(at + 2, tl.where(blurred, blue, _after_blur(blue, row)).to(tl.uint8), mask=there)


@triton.jit
def _mirrored(position, size: tl.constexpr, reach: tl.constexpr):
    """Reflect positions, at most `reach` outside of 0 … size - 1, at the first and the last one."""
    last = size - 1
    position = tl.abs(position)
    if reach > last:  # more than one reflection
        position = position % (2 * last) if last else position * 0
    return tl.minimum(position, 2 * last - position)


@triton.jit
def blur_kernel(
    images, drawn, out,
    first: tl.constexpr, reach: tl.constexpr, along_rows: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Blur the images with a positive sigma along rows or columns, with 2 · reach + 1 taps; others are left unwritten.

    Grid (blocks of bytes, b). The pass along columns is the second one; it also applies the ops that follow.
    """
    image = tl.program_id(1)
    row = drawn + image * COLUMNS + first
    sigma = tl.load(row + BLUR_SIGMA)
    if sigma > 0:
        byte = tl.program_id(0) * block + tl.arange(0, block)
        there = byte < 3 * height * width
        size, step = (width, 3) if along_rows else (height, 3 * width)
        position = byte // step % size
        base = image.to(tl.int64) * (3 * height * width)
        total = 0.0
        for tap in tl.static_range(2 * reach + 1):
            offset = (tap - reach) / sigma
            total += tl.math.exp(-0.5 * (offset * offset))
        blurred = tl.zeros([block], tl.float32)
        for tap in tl.static_range(2 * reach + 1):
            offset = (tap - reach) / sigma
            weight = tl.math.exp(-0.5 * (offset * offset)) / total
            moved = _mirrored(position + (tap - reach), size, reach) - position
            blurred += weight * tl.load(images + base + byte + moved * step, mask=there, other=0).to(tl.float32)
        blurred = _rounded(blurred)
        if not along_rows:
            blurred = _after_blur(blurred, row)
        tl.store(out + base + byte, blurred.to(tl.uint8), mask=there)

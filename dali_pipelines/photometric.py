"""The colour half of a view as a DALI graph: draw the numbers, then apply them.

replay.py does the same maths in torch from the written numbers; tests/dali_pipelines holds the two together.
Milliseconds in comments are per 224² image on one CPU core with DALI 2.4.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from dali_pipelines.augmentation import (
    IDENTITY,
    JITTER_FIELDS,
    PHOTOMETRIC_FIELDS,
    SOLARIZE_THRESHOLD,
    ColourDefinition,
    Photometric,
)
from dali_pipelines.dali import dali_math, fn, types

DataNode = Any
"""A node of a DALI graph: one value per sample. DALI ships no types."""

Backend = Literal["cpu", "gpu"]


class Drawn(NamedTuple):
    """What was drawn for one view, a scalar node each. Coins are BOOL; None stands for an op that cannot happen."""

    jitter: DataNode | None
    grayscale: DataNode | None
    blur: DataNode | None
    solarize: DataNode | None
    values: dict[str, DataNode]
    """By PHOTOMETRIC_FIELDS, FLOAT: what is done, and the identity where the coin said no. Written into `params`."""


def draw(spec: Photometric) -> Drawn:
    """Draw one view's numbers (paper, A.1)."""
    jitter = _coin(spec.jitter_probability)
    grayscale = _coin(spec.grayscale_probability)
    blur = _coin(spec.blur_probability)
    solarize = _coin(spec.solarize_probability)
    values = {
        name: types.Constant(identity, types.FLOAT, shape=[], device="cpu") for name, identity in _IDENTITIES.items()
    }
    if jitter is not None:
        for name in JITTER_FIELDS:
            values[name] = _where(jitter, spec.jitter_range(name), _IDENTITIES[name])
    if grayscale is not None:
        values["grayscale"] = _float(grayscale)
    if blur is not None:
        values["blur_sigma"] = _where(blur, spec.blur_sigma, _IDENTITIES["blur_sigma"])
    if solarize is not None:
        values["solarize"] = _float(solarize)
    return Drawn(jitter, grayscale, blur, solarize, values)


_IDENTITIES = dict(zip(PHOTOMETRIC_FIELDS, IDENTITY, strict=True))


class Shared(NamedTuple):
    """What both views of a sample start from, computed once; DALI leaves out what no op asks for."""

    image: DataNode
    """uint8 HWC."""
    mean_grey: DataNode
    """Scalar in grey levels, in CPU memory."""
    planes: DataNode
    """The image as uint8 CHW: the layout that a CPU turns colours in."""


def shared(image: DataNode, backend: Backend) -> Shared:
    """Both views' common ground, from the crop, uint8 HWC."""
    return Shared(image, argument(mean_grey(image, backend), backend), _permuted(image, "CHW"))


def apply(shared: Shared, drawn: Drawn, spec: Photometric, colour: ColourDefinition, backend: Backend) -> DataNode:
    """The view: uint8 HWC. Each op runs on the samples it was drawn for and on no other."""
    image = shared.image
    if drawn.jitter is not None and drawn.jitter:
        if colour == "torchvision":
            image = _jitter_torchvision(image, drawn.values, spec, backend)
        elif backend == "cpu":
            image = _jitter_on_planes(shared, drawn.values, spec)
        else:
            image = _jitter_on_pixels(shared, drawn.values, spec)
    if drawn.grayscale is not None and drawn.grayscale:
        image = grey(image, channels=3, backend=backend)
    if drawn.blur is not None and drawn.blur:
        image = _blur(image, drawn.values["blur_sigma"], widest=spec.blur_sigma[1], backend=backend)
    if drawn.solarize is not None and drawn.solarize:
        image = fn.lookup_table(image, keys=_LEVELS, values=_SOLARIZED, dtype=types.UINT8)
    return image


_LEVELS = list(range(256))
_SOLARIZED = [255 - level if level >= SOLARIZE_THRESHOLD else level for level in _LEVELS]


def _jitter_on_planes(shared: Shared, values: dict[str, DataNode], spec: Photometric) -> DataNode:
    """The linear definition where CPUs are fast: a circulant matrix is a filter over channels that wraps round.

    0.18 for the turn, where color_twist takes 0.95.
    """
    planes = _brightness_contrast(fn.reshape(shared.planes, shape=[3, -1, 1], layout="HWC"), shared, values, spec)
    if spec.saturation or spec.hue:
        same, next_one, last = _turn_weights(values)
        kernel = fn.reshape(fn.stack(last, same, next_one), shape=[3, 1])
        planes = fn.filter(fn.reshape(planes, shape=[3, -1], layout="HW"), kernel, border="wrap")
    return _permuted(fn.reshape(planes, shape=shared.planes.shape()), "HWC")


def _jitter_on_pixels(shared: Shared, values: dict[str, DataNode], spec: Photometric) -> DataNode:
    """The same maths in two kernels without a change of layout: what a GPU is best at."""
    image = _brightness_contrast(shared.image, shared, values, spec)
    if spec.saturation or spec.hue:
        same, next_one, last = _turn_weights(values)
        rows = [fn.stack(same, next_one, last), fn.stack(last, same, next_one), fn.stack(next_one, last, same)]
        image = fn.coord_transform(image, M=fn.stack(*rows), dtype=types.UINT8)
    return image


def _brightness_contrast(image: DataNode, shared: Shared, values: dict[str, DataNode], spec: Photometric) -> DataNode:
    """brightness · (mean grey + contrast · (x - mean grey)), rounded to uint8: 0.05 where floats take 0.35."""
    if not (spec.brightness or spec.contrast):
        return image
    return fn.brightness_contrast(
        image, brightness=values["brightness"], contrast=values["contrast"], contrast_center=shared.mean_grey
    )


def _turn_weights(values: dict[str, DataNode]) -> list[DataNode]:
    """What a channel gets of itself, of the next and of the last one: R, G, B, R, ...

    Saturation scales and hue (turns) turns the colour about the grey axis of RGB, so that the map is a circulant matrix
    and three weights are all of it. Closer to HSV than DALI's own hue, which turns in YIQ: 26.9 against 22.4 dB.
    """
    angles = (2 * math.pi * (values["hue"] + channel / 3) for channel in range(3))
    return [(1.0 + 2.0 * values["saturation"] * dali_math.cos(angle)) / 3.0 for angle in angles]


def _blur(image: DataNode, sigma: DataNode, *, widest: float, backend: Backend) -> DataNode:
    """torchvision's GaussianBlur with 2·ceil(3·widest) + 1 taps (13 for the paper's), borders mirrored.

    On CPU as two filters, rounded between: 0.2, where gaussian_blur takes 0.7 to 1.6.
    """
    reach = math.ceil(3 * widest)
    taps = 2 * reach + 1
    if backend == "gpu":
        return fn.gaussian_blur(image, sigma=sigma, window_size=taps)
    offsets = types.Constant(np.arange(-reach, reach + 1, dtype=np.float32), device="cpu")
    weights = dali_math.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / fn.reductions.sum(weights)
    image = fn.filter(image, fn.reshape(weights, shape=[1, taps]))
    return fn.filter(image, fn.reshape(weights, shape=[taps, 1]))


def _jitter_torchvision(image: DataNode, values: dict[str, DataNode], spec: Photometric, backend: Backend) -> DataNode:
    """torchvision's adjust_brightness, _contrast, _saturation, _hue on uint8: clamped and truncated after each."""
    if spec.brightness:
        image = fn.brightness_contrast(image, brightness=values["brightness"], brightness_shift=TRUNCATE)
    if spec.contrast:
        centre = argument(mean_grey(image, backend), backend)
        image = fn.brightness_contrast(
            image, contrast=values["contrast"], contrast_center=centre, brightness_shift=TRUNCATE
        )
    if spec.saturation:
        saturation = operand(values["saturation"], backend)
        image = to_uint8(saturation * image + (1.0 - saturation) * grey(image, channels=3, backend=backend))
    if spec.hue:
        image = _rotate_hue(image, operand(values["hue"], backend))
    return image


TRUNCATE = -0.499 / 255
"""As brightness_shift: rounding to nearest becomes truncation."""


def _rotate_hue(image: DataNode, turns: DataNode) -> DataNode:
    """Add to the hue of HSV, saturation and value unchanged. On planes, which DALI's arithmetic is fastest on."""
    planes = fn.cast(fn.transpose(image, perm=[2, 0, 1]), dtype=types.FLOAT)
    red, green, blue = planes[0], planes[1], planes[2]
    value = dali_math.max(dali_math.max(red, green), blue)
    lowest = dali_math.min(dali_math.min(red, green), blue)
    chroma = value - lowest
    is_red = _float(red == value)
    is_green = _float(green == value) * (1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    within = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    sixths = within / dali_math.max(chroma, 1.0) + 2.0 * is_green + 4.0 * is_blue + 6.0 * turns
    hue = sixths - 6.0 * dali_math.floor(sixths / 6.0)
    # How much of the chroma each channel has at this hue, from 0 to 6: all six sectors of HSV → RGB in one formula.
    shares = (dali_math.abs(hue - 3.0) - 1.0, 2.0 - dali_math.abs(hue - 2.0), 2.0 - dali_math.abs(hue - 4.0))
    turned = (lowest + chroma * dali_math.max(dali_math.min(share, 1.0), 0.0) for share in shares)
    return _permuted(to_uint8(fn.stack(*turned, axis=0) * _FLOAT_TO_UINT8), "HWC")


_FLOAT_TO_UINT8 = 255.999 / 255
"""torchvision turns v in [0, 1] into the uint8 trunc(255.999 v)."""


LUMA = (0.299, 0.587, 0.114)


def grey(image: DataNode, channels: Literal[1, 3], backend: Backend) -> DataNode:
    """Luma 0.299 R + 0.587 G + 0.114 B, rounded, as uint8 HWC of 1 or 3 equal channels.

    On a GPU as one product for the whole batch, where color_space_conversion launches a kernel an image.
    """
    if backend == "gpu":
        return fn.coord_transform(image, M=[*LUMA] * channels, dtype=types.UINT8)
    grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    if channels == 1:
        return grey
    return fn.color_space_conversion(grey, image_type=types.GRAY, output_type=types.RGB)


def mean_grey(image: DataNode, backend: Backend) -> DataNode:
    """Scalar in grey levels. By way of the grey image, which costs half of averaging three channels."""
    return fn.reductions.mean(grey(image, channels=1, backend=backend))


def contiguous(image: DataNode, backend: Backend) -> DataNode:
    """As an output that torch can take as it lies: on a GPU a merged batch would be copied image by image."""
    return fn.copy(image) if backend == "gpu" else image


def to_uint8(image: DataNode) -> DataNode:
    """Clamp to [0, 255] and truncate. A slice that converts: 0.14, where cast takes 0.31 and color_twist itself 0.6."""
    return fn.slice(image, start=[0], rel_shape=[1.0], axes=[0], dtype=types.UINT8)


def _permuted(image: DataNode, layout: Literal["CHW", "HWC"]) -> DataNode:
    """uint8 of the other of the two layouts to this one.

    By an operator that can also normalise, and here does not: 0.07, where transpose takes 0.22.
    """
    image = fn.reinterpret(image, layout="HWC" if layout == "CHW" else "CHW")
    return fn.crop_mirror_normalize(image, dtype=types.UINT8, output_layout=layout, mean=[0.0], std=[1.0])


def argument(node: DataNode, backend: Backend) -> DataNode:
    """As a per-sample argument of an operator: DALI takes those from CPU memory only."""
    return node.cpu() if backend == "gpu" else node


def operand(node: DataNode, backend: Backend) -> DataNode:
    """As an operand in arithmetic with images."""
    return node.gpu() if backend == "gpu" else node


def _coin(probability: float) -> DataNode | None:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL) if probability > 0 else None


def _where(coin: DataNode, drawn_from: tuple[float, float], otherwise: float) -> DataNode:
    """A uniform draw where the coin says yes. Multiplied by 1 and added to 0, so the draw itself, bit for bit."""
    low, high = drawn_from
    drawn = fn.random.uniform(range=[low, high]) if low < high else low  # DALI refuses an empty range
    yes = _float(coin)
    return yes * drawn + (1.0 - yes) * otherwise


def _float(node: DataNode) -> DataNode:
    return fn.cast(node, dtype=types.FLOAT)

"""timm's RandAugment as a DALI graph: the string says what is drawn, as in `rand-m9-mstd0.5-inc1` (paper, A.2).

What an op does at a magnitude is timm's `auto_augment.py` and, below it, Pillow's arithmetic; DALI's own auto_aug has
other ranges, bins and fill colours. Fill and interpolation are what timm's `create_transform` gives the ops: the mean
colour of ImageNet, and what the crop was resized with. Not Pillow's to within a grey level are only rotation and shears
where the crop is resized by `cubic`: they are interpolated linearly, for DALI's warp has nothing else.
tests/dali_pipelines/test_rand_augment.py holds each op to timm's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dali_pipelines.augmentation import MEAN_COLOUR, AugmentationError
from dali_pipelines.dali import dali_math, fn, types
from dali_pipelines.photometric import TRUNCATE, Backend, DataNode, argument, grey, mean_grey, operand, to_uint8
from dali_pipelines.reader import Interpolation

MOST = 10.0
"""The largest magnitude."""


@dataclass(frozen=True)
class RandAugment:
    """The numbers in the string."""

    magnitude: int = 10
    """m: mean magnitude, 0 to 10."""
    layers: int = 2
    """n: ops drawn for an image, with replacement."""
    probability: float = 0.5
    """p: with which each of them is done at all."""
    std: float = 0.0
    """mstd: standard deviation of the magnitude of each, which is then cut to 0 to 10."""
    increasing: bool = False
    """inc: whether every op does more at a larger magnitude (else posterize, solarize do less, and the enhancing ops
    go from 0.1 to 1.9 of what an image has)."""


_SECTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "m": ("magnitude", int),
    "n": ("layers", int),
    "p": ("probability", float),
    "mstd": ("std", float),
    "inc": ("increasing", lambda digits: bool(int(digits))),
}


def parse(text: str) -> RandAugment:
    """The numbers in a string as `rand-m9-mstd0.5-inc1`. AugmentationError names the section that cannot be read."""
    first, *sections = text.split("-")
    if first != "rand":
        raise AugmentationError(f"rand_augment '{text}' must begin with 'rand', as rand-m9-mstd0.5-inc1 does")
    values = {}
    for section in sections:
        match = re.fullmatch(r"([a-z]+)(\d+\.?\d*)", section)
        if match is None or match[1] not in _SECTIONS:
            raise AugmentationError(
                f"rand_augment '{text}': section '{section}' is none of m, n, p, mstd and inc followed by a number"
            )
        name, number = _SECTIONS[match[1]]
        try:
            values[name] = number(match[2])
        except ValueError as error:
            raise AugmentationError(f"rand_augment '{text}': section '{section}' needs a whole number") from error
    spec = RandAugment(**values)
    if not (spec.magnitude <= MOST and spec.probability <= 1 and spec.std <= 100):
        raise AugmentationError(f"rand_augment '{text}': m can be at most 10, p at most 1 and mstd at most 100")
    return spec


class Drawn(NamedTuple):
    """What was drawn for one layer, a scalar node each."""

    op: DataNode
    """INT32: a place in OPS; NOTHING where no op is done."""
    level: DataNode
    """FLOAT: the magnitude, and as its sign the direction of ops that have two: -10 to 10."""


class Context(NamedTuple):
    """What every op is given beside the image. One number a sample: DALI hands each on through every condition."""

    level: DataNode
    increasing: bool
    size: int
    """Side of the image in pixels."""
    interpolation: Interpolation
    backend: Backend


Op = Callable[[DataNode, Context], DataNode]
"""What is done to an image (uint8 HWC)."""


def draw(spec: RandAugment) -> list[Drawn]:
    """Draw the layers of one image."""
    return [_draw_layer(spec) for _ in range(spec.layers)]


def _draw_layer(spec: RandAugment) -> Drawn:
    done = fn.random.coin_flip(probability=spec.probability, dtype=types.INT32)
    op = fn.cast(fn.random.uniform(values=[float(number) for number in range(len(OPS))]), dtype=types.INT32)
    magnitude = types.Constant(float(spec.magnitude), types.FLOAT, shape=[], device="cpu")
    if spec.std > 0:
        magnitude = fn.random.normal(mean=float(spec.magnitude), stddev=spec.std)
        magnitude = dali_math.clamp(magnitude, 0.0, MOST)
    direction = fn.random.uniform(values=[-1.0, 1.0])
    return Drawn(done * op + (1 - done) * NOTHING, direction * magnitude)


def apply(
    image: DataNode, layers: list[Drawn], increasing: bool, size: int, interpolation: Interpolation, backend: Backend
) -> DataNode:
    """The image (uint8 HWC, size×size) after the ops of its layers. Each op runs on the samples it was drawn for."""
    for drawn in layers:
        context = Context(drawn.level, increasing, size, interpolation, backend)
        if drawn.op != NOTHING:
            image = _one_of(list(OPS.values()), 0, drawn.op, image, context)
    return image


def _one_of(ops: list[Op], first: int, op: DataNode, image: DataNode, context: Context) -> DataNode:
    """The image after `ops[op - first]`, found by halving: every condition has a cost, also where it is not met."""
    if len(ops) == 1:
        return ops[0](image, context)
    half = len(ops) // 2
    if op < first + half:
        image = _one_of(ops[:half], first, op, image, context)
    else:
        image = _one_of(ops[half:], first + half, op, image, context)
    return image


def _auto_contrast(image: DataNode, context: Context) -> DataNode:
    """Each channel stretched to [0, 255]."""
    low = argument(fn.reductions.min(image, axes=[0, 1]), context.backend)
    high = argument(fn.reductions.max(image, axes=[0, 1]), context.backend)
    low, spread = fn.cast(low, dtype=types.FLOAT), fn.cast(high - low, dtype=types.FLOAT)
    flat = fn.cast(spread == 0.0, dtype=types.FLOAT)
    return fn.crop_mirror_normalize(
        image,
        dtype=types.UINT8,
        output_layout="HWC",
        mean=low * (1.0 - flat),
        std=spread / 255.0 + flat,
        shift=255 * TRUNCATE,
    )


def _equalize(image: DataNode, context: Context) -> DataNode:
    """A level goes where the share of pixels below it says. DALI's counts those up to it; inverted, it counts below."""
    full = types.Constant(255, types.UINT8)
    return full - fn.equalize(full - image)


def _invert(image: DataNode, context: Context) -> DataNode:
    return types.Constant(255, types.UINT8) - image


def _posterize(image: DataNode, context: Context) -> DataNode:
    """Only the first bits, 4 to 0 of them, are kept."""
    taken = _whole(context, 4.0)
    bits = 4.0 - taken if context.increasing else taken
    mask = fn.cast(256.0 - dali_math.pow(2.0, 8.0 - bits), dtype=types.UINT8)
    return image & operand(mask, context.backend)


def _solarize(image: DataNode, context: Context) -> DataNode:
    """Levels at or above the threshold are inverted."""
    level = _whole(context, 256.0)
    threshold = fn.cast(256.0 - level if context.increasing else level, dtype=types.INT32)
    return image ^ (types.Constant(255, types.UINT8) * (image >= operand(threshold, context.backend)))


def _solarize_add(image: DataNode, context: Context) -> DataNode:
    """Levels below 128 are raised by up to 110."""
    raised = fn.cast(_whole(context, 110.0), dtype=types.UINT8)
    return image + operand(raised, context.backend) * (image < types.Constant(128, types.UINT8))


def _colour(image: DataNode, context: Context) -> DataNode:
    factor = operand(_enhancing_factor(context), context.backend)
    return to_uint8(factor * image + (1.0 - factor) * grey(image, channels=3, backend=context.backend))


def _contrast(image: DataNode, context: Context) -> DataNode:
    """About the mean grey, itself a whole level."""
    centre = dali_math.floor(argument(mean_grey(image, context.backend), context.backend) + 0.5)
    factor = _enhancing_factor(context)
    return fn.brightness_contrast(image, contrast=factor, contrast_center=centre, brightness_shift=TRUNCATE)


def _brightness(image: DataNode, context: Context) -> DataNode:
    return fn.brightness_contrast(image, brightness=_enhancing_factor(context), brightness_shift=TRUNCATE)


def _sharpness(image: DataNode, context: Context) -> DataNode:
    """Between (factor 0) the image smoothed by Pillow's SMOOTH, and away from it."""
    factor = _enhancing_factor(context)
    smooth = types.Constant(np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13, device="cpu")
    itself = types.Constant(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32), device="cpu")
    kernel = factor * itself + (1.0 - factor) * smooth
    return fn.filter(image, operand(kernel, context.backend), border="clamp")


def _rotate(image: DataNode, context: Context) -> DataNode:
    """By up to 30 degrees about the middle, positive against the clock."""
    half = context.size / 2
    return _warp(image, fn.transforms.rotation(angle=context.level * (30.0 / MOST), center=[half, half]), context)


def _shear_x(image: DataNode, context: Context) -> DataNode:
    return _warp(image, fn.transforms.shear(shear=fn.stack(context.level * (0.3 / MOST), 0.0)), context)


def _shear_y(image: DataNode, context: Context) -> DataNode:
    return _warp(image, fn.transforms.shear(shear=fn.stack(0.0, context.level * (0.3 / MOST))), context)


def _translate_x(image: DataNode, context: Context) -> DataNode:
    return _translate(image, 1, context)


def _translate_y(image: DataNode, context: Context) -> DataNode:
    return _translate(image, 0, context)


OPS: dict[str, Op] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _colour,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
"""The ops by timm's names (those that `inc` changes have another word, Increasing, in timm's), drawn uniformly."""

NOTHING = len(OPS)
"""In place of an op: none is done."""


def _enhancing_factor(context: Context) -> DataNode:
    """1: nothing changes; 0: all of what the op works on is taken away."""
    if context.increasing:
        return dali_math.max(0.1, 1.0 + context.level * (0.9 / MOST))
    return dali_math.abs(context.level) * (1.8 / MOST) + 0.1


def _translate(image: DataNode, axis: int, context: Context) -> DataNode:
    """By up to 0.45 of the side, exactly as Pillow: a filter for the part of a pixel, then a cut for the whole ones."""
    pixels = context.level * (0.45 * context.size / MOST)
    whole = dali_math.floor(pixels + 0.5)
    places = types.Constant(np.arange(-2, 3, dtype=np.float32), device="cpu")
    weights = _WEIGHTS[context.interpolation](dali_math.abs(places - (pixels - whole)))
    kernel = operand(fn.reshape(weights, shape=[1, 5] if axis == 1 else [5, 1]), context.backend)
    image = fn.filter(image, kernel, border="clamp")
    return fn.slice(
        image,
        start=fn.reshape(fn.cast(whole, dtype=types.INT32), shape=[1]),
        shape=[context.size],
        axes=[axis],
        out_of_bounds_policy="pad",
        fill_values=list(MEAN_COLOUR),
    )


def _linear(distance: DataNode) -> DataNode:
    return dali_math.max(0.0, 1.0 - distance)


def _cubic(distance: DataNode) -> DataNode:
    """Pillow's kernel for transforms: a = -1, where its resizing has -0.5."""
    x = dali_math.min(distance, 2.0)
    near = (x - 2.0) * x * x + 1.0
    far = ((5.0 - x) * x - 8.0) * x + 4.0
    inner = fn.cast(x < 1.0, dtype=types.FLOAT)
    return inner * near + (1.0 - inner) * far


_WEIGHTS: dict[Interpolation, Callable[[DataNode], DataNode]] = {"linear": _linear, "cubic": _cubic}


def _warp(image: DataNode, matrix: DataNode, context: Context) -> DataNode:
    """From each output pixel's place to the place `matrix` [2, 3] gives in the image; what lies outside is filled.

    DALI fills with one grey level only, but repeats the border where it is not told to fill: so a border of
    the fill is laid about the image.
    """
    framed = fn.slice(
        image,
        start=[-1, -1],
        shape=[context.size + 2, context.size + 2],
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=list(MEAN_COLOUR),
    )
    into_frame = fn.transforms.translation(matrix, offset=[1.0, 1.0])
    return fn.warp_affine(framed, matrix=into_frame, size=[context.size, context.size])


def _whole(context: Context, most: float) -> DataNode:
    """`most` times the share of the magnitude, rounded down; what is just under a whole number counts as it."""
    return dali_math.floor(dali_math.abs(context.level) * (most / MOST) + 1e-4)

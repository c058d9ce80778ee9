"""timm's RandAugment as a DALI graph, set by a string like `rand-m9-mstd0.5-inc1` (paper, A.2).

Ops and magnitudes follow timm's `auto_augment.py` and Pillow's arithmetic; DALI's own auto_aug has other ranges, bins
and fill colours. Fill and interpolation are those of timm's `create_transform`: ImageNet's mean colour, and the
interpolation of the crop's resize.

Each op matches Pillow to within a grey level (tests/dali_pipelines/test_rand_augment.py), except rotation and shears
after a `cubic` resize: DALI's warp interpolates only linearly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dali_pipelines.augmentations import MEAN_COLOUR
from dali_pipelines.crops import MAX_MAGNITUDE, Interpolation, RandAugment
from dali_pipelines.dali import dali_math, fn, types
from dali_pipelines.pixels import (
    TRUNCATE,
    Backend,
    DataNode,
    as_op_argument,
    as_operand,
    grey,
    mean_grey,
    to_uint8,
)


class RandAugmentParams(NamedTuple):
    """Sampled parameters of one layer, scalar nodes."""

    op: DataNode
    """Index into OPS, INT32; IDENTITY_OP where no op is applied."""
    level: DataNode
    """Magnitude (-10 to 10), FLOAT. The sign is the direction of ops that have two."""


class OpArgs(NamedTuple):
    """Arguments of every op. `level` is the only one per sample: DALI passes each such node through every condition."""

    level: DataNode
    """Signed magnitude (-10 to 10), FLOAT."""
    increasing: bool
    size: int
    """Side of the image (pixels)."""
    interpolation: Interpolation
    backend: Backend


Op = Callable[[DataNode, OpArgs], DataNode]
"""Function that applies an op to an image (uint8 HWC)."""


def sample(spec: RandAugment) -> list[RandAugmentParams]:
    """Sample the layers of one image."""
    return [_sample_layer(spec) for _ in range(spec.layers)]


def _sample_layer(spec: RandAugment) -> RandAugmentParams:
    done = fn.random.coin_flip(probability=spec.probability, dtype=types.INT32)
    op = fn.cast(fn.random.uniform(values=[float(number) for number in range(len(OPS))]), dtype=types.INT32)
    magnitude = types.Constant(float(spec.magnitude), types.FLOAT, shape=[], device="cpu")
    if spec.std > 0:
        magnitude = fn.random.normal(mean=float(spec.magnitude), stddev=spec.std)
        magnitude = dali_math.clamp(magnitude, 0.0, MAX_MAGNITUDE)
    direction = fn.random.uniform(values=[-1.0, 1.0])
    return RandAugmentParams(done * op + (1 - done) * IDENTITY_OP, direction * magnitude)


def apply(
    image: DataNode,
    layers: list[RandAugmentParams],
    increasing: bool,
    size: int,
    interpolation: Interpolation,
    backend: Backend,
) -> DataNode:
    """Apply the layers to an image (uint8 HWC, size×size). Each op runs only on the samples that it was drawn for."""
    for drawn in layers:
        context = OpArgs(drawn.level, increasing, size, interpolation, backend)
        if drawn.op != IDENTITY_OP:
            image = _one_of(list(OPS.values()), 0, drawn.op, image, context)
    return image


def _one_of(ops: list[Op], first: int, op: DataNode, image: DataNode, context: OpArgs) -> DataNode:
    """Apply `ops[op - first]`, found by bisection, because every condition has a cost, also where it is false."""
    if len(ops) == 1:
        return ops[0](image, context)
    half = len(ops) // 2
    if op < first + half:
        image = _one_of(ops[:half], first, op, image, context)
    else:
        image = _one_of(ops[half:], first + half, op, image, context)
    return image


def _auto_contrast(image: DataNode, context: OpArgs) -> DataNode:
    """Stretch each channel to [0, 255]."""
    low = as_op_argument(fn.reductions.min(image, axes=[0, 1]), context.backend)
    high = as_op_argument(fn.reductions.max(image, axes=[0, 1]), context.backend)
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


def _equalize(image: DataNode, context: OpArgs) -> DataNode:
    """Map each level by the share of pixels below it. DALI counts pixels up to the level; inversion corrects this."""
    full = types.Constant(255, types.UINT8)
    return full - fn.equalize(full - image)


def _invert(image: DataNode, context: OpArgs) -> DataNode:
    return types.Constant(255, types.UINT8) - image


def _posterize(image: DataNode, context: OpArgs) -> DataNode:
    """Keep the 4 to 0 most significant bits."""
    amount = _int_magnitude(context, 4.0)
    bits = 4.0 - amount if context.increasing else amount
    mask = fn.cast(256.0 - dali_math.pow(2.0, 8.0 - bits), dtype=types.UINT8)
    return image & as_operand(mask, context.backend)


def _solarize(image: DataNode, context: OpArgs) -> DataNode:
    """Invert levels at or above the threshold."""
    level = _int_magnitude(context, 256.0)
    threshold = fn.cast(256.0 - level if context.increasing else level, dtype=types.INT32)
    return image ^ (types.Constant(255, types.UINT8) * (image >= as_operand(threshold, context.backend)))


def _solarize_add(image: DataNode, context: OpArgs) -> DataNode:
    """Add up to 110 to levels below 128."""
    raised = fn.cast(_int_magnitude(context, 110.0), dtype=types.UINT8)
    return image + as_operand(raised, context.backend) * (image < types.Constant(128, types.UINT8))


def _colour(image: DataNode, context: OpArgs) -> DataNode:
    factor = as_operand(_enhancing_factor(context), context.backend)
    return to_uint8(factor * image + (1.0 - factor) * grey(image, channels=3, backend=context.backend))


def _contrast(image: DataNode, context: OpArgs) -> DataNode:
    """Scale about the mean grey, rounded to a whole level."""
    centre = dali_math.floor(as_op_argument(mean_grey(image, context.backend), context.backend) + 0.5)
    factor = _enhancing_factor(context)
    return fn.brightness_contrast(image, contrast=factor, contrast_center=centre, brightness_shift=TRUNCATE)


def _brightness(image: DataNode, context: OpArgs) -> DataNode:
    return fn.brightness_contrast(image, brightness=_enhancing_factor(context), brightness_shift=TRUNCATE)


def _sharpness(image: DataNode, context: OpArgs) -> DataNode:
    """Interpolate between the image (factor 1) and its result of Pillow's SMOOTH (factor 0); extrapolate above 1."""
    factor = _enhancing_factor(context)
    smooth = types.Constant(np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13, device="cpu")
    identity = types.Constant(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32), device="cpu")
    kernel = factor * identity + (1.0 - factor) * smooth
    return fn.filter(image, as_operand(kernel, context.backend), border="clamp")


def _rotate(image: DataNode, context: OpArgs) -> DataNode:
    """Rotate by up to 30 degrees about the centre; positive angles are counter-clockwise."""
    half = context.size / 2
    return _warp(
        image, fn.transforms.rotation(angle=context.level * (30.0 / MAX_MAGNITUDE), center=[half, half]), context
    )


def _shear_x(image: DataNode, context: OpArgs) -> DataNode:
    return _warp(image, fn.transforms.shear(shear=fn.stack(context.level * (0.3 / MAX_MAGNITUDE), 0.0)), context)


def _shear_y(image: DataNode, context: OpArgs) -> DataNode:
    return _warp(image, fn.transforms.shear(shear=fn.stack(0.0, context.level * (0.3 / MAX_MAGNITUDE))), context)


def _translate_x(image: DataNode, context: OpArgs) -> DataNode:
    return _translate(image, 1, context)


def _translate_y(image: DataNode, context: OpArgs) -> DataNode:
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
"""Ops by timm's names, sampled uniformly. timm appends `Increasing` to the names of those that `inc` changes."""

IDENTITY_OP = len(OPS)
"""Index where no op is applied."""


def _enhancing_factor(context: OpArgs) -> DataNode:
    """Return the factor of an enhancing op: 1 leaves the image unchanged, 0 removes the property completely."""
    if context.increasing:
        return dali_math.max(0.1, 1.0 + context.level * (0.9 / MAX_MAGNITUDE))
    return dali_math.abs(context.level) * (1.8 / MAX_MAGNITUDE) + 0.1


def _translate(image: DataNode, axis: int, context: OpArgs) -> DataNode:
    """Translate by up to 0.45 of the side, like Pillow: a filter shifts by subpixels, then a slice by whole pixels."""
    pixels = context.level * (0.45 * context.size / MAX_MAGNITUDE)
    whole = dali_math.floor(pixels + 0.5)
    taps = types.Constant(np.arange(-2, 3, dtype=np.float32), device="cpu")
    weights = _WEIGHTS[context.interpolation](dali_math.abs(taps - (pixels - whole)))
    kernel = as_operand(fn.reshape(weights, shape=[1, 5] if axis == 1 else [5, 1]), context.backend)
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
    """Evaluate Pillow's cubic kernel for transforms, with a = -1 (its resize uses a = -0.5)."""
    x = dali_math.min(distance, 2.0)
    near = (x - 2.0) * x * x + 1.0
    far = ((5.0 - x) * x - 8.0) * x + 4.0
    inner = fn.cast(x < 1.0, dtype=types.FLOAT)
    return inner * near + (1.0 - inner) * far


_WEIGHTS: dict[Interpolation, Callable[[DataNode], DataNode]] = {"linear": _linear, "cubic": _cubic}


def _warp(image: DataNode, matrix: DataNode, context: OpArgs) -> DataNode:
    """Warp by `matrix` [2, 3], which maps output to input positions; positions outside the image get MEAN_COLOUR.

    DALI fills with a single grey level, but repeats the border pixels without a fill. Therefore the image is padded
    with a border of the fill colour.
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


def _int_magnitude(context: OpArgs, most: float) -> DataNode:
    """Return `most` · |magnitude| / 10, rounded down, with a tolerance of 1e-4 below whole numbers."""
    return dali_math.floor(dali_math.abs(context.level) * (most / MAX_MAGNITUDE) + 1e-4)

"""Photometric ops of a view as a DALI graph: sampling and application.

replay.py implements the same maths in torch from the recorded parameters; tests/dali_pipelines compares the two. Times
in comments are milliseconds per 224² image on one CPU core with DALI 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dali_pipelines.augmentations import (
    DESTRUCTIVE_OPS,
    JITTER_OPS,
    OPS,
    SOLARIZE_THRESHOLD,
    JitterImpl,
    PhotometricConfig,
)
from dali_pipelines.dali import dali_math, fn, types
from dali_pipelines.jitter import SharedImage, apply_jitter
from dali_pipelines.pixels import Backend, DataNode, as_operand, grey, to_float


class PhotometricParams(NamedTuple):
    """Sampled parameters of one view, scalar nodes."""

    coins: dict[str, DataNode | None]
    """Flags of `jitter` and of each destructive op, BOOL; None for an op with probability 0."""
    values: dict[str, DataNode]
    """Parameters by PHOTOMETRIC_FIELDS, FLOAT; the identity where an op is not applied. Recorded in `params`."""


def sample(spec: PhotometricConfig) -> PhotometricParams:
    """Sample the parameters of one view (paper, A.1)."""
    coins = {"jitter": _bernoulli(spec.jitter_probability)}
    for op in DESTRUCTIVE_OPS:
        coins[op.name] = _bernoulli(spec.probability(op))
    values = {op.field: types.Constant(op.identity, types.FLOAT, shape=[], device="cpu") for op in OPS}
    for op in OPS:
        coin = coins["jitter" if op.kind == "jitter" else op.name]
        if coin is not None and spec.applies(op):
            values[op.field] = to_float(coin) if op.is_switch else _uniform_if(coin, spec.value_range(op), op.identity)
    return PhotometricParams(coins, values)


def apply(
    shared: SharedImage, drawn: PhotometricParams, spec: PhotometricConfig, jitter_impl: JitterImpl, backend: Backend
) -> DataNode:
    """Apply the sampled ops and return the view, uint8 HWC. Each op runs only on samples where its coin is true."""
    image = shared.image
    jitter = drawn.coins["jitter"]
    if jitter is not None and jitter:
        image = apply_jitter(shared, drawn.values, spec, jitter_impl, backend)
        for op in JITTER_OPS:
            if op.name in JITTER_MATHS and spec.applies(op):
                image = JITTER_MATHS[op.name](image, drawn.values[op.field], spec, backend)
    for op in DESTRUCTIVE_OPS:
        coin = drawn.coins[op.name]
        if coin is not None and coin:
            image = DESTRUCTIVE_MATHS[op.name](image, drawn.values[op.field], spec, backend)
    return image


def _gamma(image: DataNode, gamma: DataNode, spec: PhotometricConfig, backend: Backend) -> DataNode:
    """Raise grey levels, as shares of white, to the power of gamma: 2.1 ms, on a GPU two kernels.

    Without the scale as an argument of the last operator it would be five.
    """
    white = dali_math.fpow(255.0, gamma - 1.0)
    return _divided(dali_math.fpow(image, as_operand(gamma, backend)), white, white, white)


def _temperature(image: DataNode, stops: DataNode, spec: PhotometricConfig, backend: Backend) -> DataNode:
    """Multiply red by 2^stops and blue by 2^-stops: 0.9 ms (coord_transform 1.6 ms)."""
    gain = dali_math.pow(2.0, stops)
    return _divided(image, 1.0 / gain, 1.0, gain)


def _divided(image: DataNode, red: DataNode, green: DataNode, blue: DataNode) -> DataNode:
    """Divide the channels by these scalars and round to uint8."""
    divisors = fn.stack(red, green, blue)
    return fn.crop_mirror_normalize(image, dtype=types.UINT8, output_layout="HWC", mean=[0.0], std=divisors)


def _rotation(image: DataNode, turns: DataNode, spec: PhotometricConfig, backend: Backend) -> DataNode:
    """Rotate about the centre, with mirrored borders: 0.5 ms. warp_affine takes 1.7 ms and has no mirrored borders."""
    centre = to_float(image.shape()[:2]) / 2.0
    matrix = fn.transforms.rotation(angle=360.0 * turns, center=fn.stack(centre[1], centre[0]))
    last_row = types.Constant(np.array([[0, 0, 1]], np.float32), device="cpu")
    return fn.experimental.warp_perspective(image, matrix=fn.cat(matrix, last_row), border_mode="reflect")


JITTER_MATHS: dict[str, Callable[[DataNode, DataNode, PhotometricConfig, Backend], DataNode]] = {
    "gamma": _gamma,
    "temperature": _temperature,
    "rotation": _rotation,
}
"""Graph function of each jitter op that jitter.py has not: from an image (uint8 HWC) and the parameter to an image."""


def _grayscale(image: DataNode, done: DataNode, spec: PhotometricConfig, backend: Backend) -> DataNode:
    return grey(image, channels=3, backend=backend)


def _blur(image: DataNode, sigma: DataNode, spec: PhotometricConfig, backend: Backend) -> DataNode:
    """Apply torchvision's GaussianBlur with 2·ceil(3·widest) + 1 taps (13 for the paper's) and mirrored borders.

    On a CPU, two filters with rounding in between take 0.2 ms, gaussian_blur 0.7 to 1.6 ms.
    """
    reach = math.ceil(3 * spec.blur_sigma[1])
    taps = 2 * reach + 1
    if backend == "gpu":
        return fn.gaussian_blur(image, sigma=sigma, window_size=taps)
    offsets = types.Constant(np.arange(-reach, reach + 1, dtype=np.float32), device="cpu")
    weights = dali_math.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / fn.reductions.sum(weights)
    image = fn.filter(image, fn.reshape(weights, shape=[1, taps]))
    return fn.filter(image, fn.reshape(weights, shape=[taps, 1]))


def _solarize(image: DataNode, done: DataNode, spec: PhotometricConfig, backend: Backend) -> DataNode:
    return fn.lookup_table(image, keys=_LEVELS, values=_SOLARIZED, dtype=types.UINT8)


_LEVELS = list(range(256))
_SOLARIZED = [255 - level if level >= SOLARIZE_THRESHOLD else level for level in _LEVELS]

DESTRUCTIVE_MATHS: dict[str, Callable[[DataNode, DataNode, PhotometricConfig, Backend], DataNode]] = {
    "grayscale": _grayscale,
    "blur": _blur,
    "solarize": _solarize,
}
"""Graph function of each destructive op: from an image (uint8 HWC) and the op's parameter to an image."""


def _bernoulli(probability: float) -> DataNode | None:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL) if probability > 0 else None


def _uniform_if(coin: DataNode, drawn_from: tuple[float, float], otherwise: float) -> DataNode:
    """Sample uniformly where `coin` is true, else return `otherwise`. The arithmetic keeps the sample bit-identical."""
    low, high = drawn_from
    drawn = fn.random.uniform(range=[low, high]) if low < high else low  # DALI refuses an empty range
    yes = to_float(coin)
    return yes * drawn + (1.0 - yes) * otherwise

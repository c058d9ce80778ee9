"""Photometric ops of a view as a DALI graph: sampling and application.

replay.py implements the same maths in torch from the recorded parameters; tests/dali_pipelines compares the two. Times
in comments are milliseconds per 224² image on one CPU core with DALI 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from dali_pipelines.augmentations import (
    DESTRUCTIVE_OPS,
    FLOAT_TO_UINT8,
    LUMA,
    OPS,
    SOLARIZE_THRESHOLD,
    JitterImpl,
    PhotometricConfig,
)
from dali_pipelines.dali import dali_math, fn, types

DataNode = Any
"""A node of a DALI graph: one value per sample. DALI ships no types."""

Backend = Literal["cpu", "gpu"]
"""Device of DALI's operators on images."""


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
        if coin is not None:
            values[op.field] = _float(coin) if op.is_switch else _uniform_if(coin, spec.value_range(op), op.identity)
    return PhotometricParams(coins, values)


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
    return SharedImage(image, as_op_argument(mean_grey(image, backend), backend), _permuted(image, "CHW"))


def apply(
    shared: SharedImage, drawn: PhotometricParams, spec: PhotometricConfig, jitter_impl: JitterImpl, backend: Backend
) -> DataNode:
    """Apply the sampled ops and return the view, uint8 HWC. Each op runs only on samples where its coin is true."""
    image = shared.image
    jitter = drawn.coins["jitter"]
    if jitter is not None and jitter:
        image = _jitter(shared, drawn.values, spec, jitter_impl, backend)
    for op in DESTRUCTIVE_OPS:
        coin = drawn.coins[op.name]
        if coin is not None and coin:
            image = DESTRUCTIVE_MATHS[op.name](image, drawn.values[op.field], spec, backend)
    return image


def _jitter(
    shared: SharedImage, values: dict[str, DataNode], spec: PhotometricConfig, jitter_impl: JitterImpl, backend: Backend
) -> DataNode:
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
    return _permuted(fn.reshape(planes, shape=shared.planes.shape()), "HWC")


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


TRUNCATE = -0.499 / 255
"""Value of brightness_shift that turns rounding to nearest into truncation."""


def _rotate_hue(image: DataNode, turns: DataNode) -> DataNode:
    """Shift the hue in HSV by `turns`; saturation and value stay. DALI's arithmetic is fastest on CHW planes."""
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
    # Share of the chroma of each channel at this hue (0 to 6): all six sectors of HSV → RGB in one formula.
    shares = (dali_math.abs(hue - 3.0) - 1.0, 2.0 - dali_math.abs(hue - 2.0), 2.0 - dali_math.abs(hue - 4.0))
    turned = (lowest + chroma * dali_math.max(dali_math.min(share, 1.0), 0.0) for share in shares)
    return _permuted(to_uint8(fn.stack(*turned, axis=0) * FLOAT_TO_UINT8), "HWC")


def grey(image: DataNode, channels: Literal[1, 3], backend: Backend) -> DataNode:
    """Compute the luma 0.299 R + 0.587 G + 0.114 B, rounded, as uint8 HWC with 1 channel or 3 equal channels.

    On a GPU, one matrix product serves the whole batch; color_space_conversion launches one kernel per image.
    """
    if backend == "gpu":
        return fn.coord_transform(image, M=[*LUMA] * channels, dtype=types.UINT8)
    grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    if channels == 1:
        return grey
    return fn.color_space_conversion(grey, image_type=types.GRAY, output_type=types.RGB)


def mean_grey(image: DataNode, backend: Backend) -> DataNode:
    """Compute the mean luma (grey levels, scalar) from the grey image: half the time of averaging three channels."""
    return fn.reductions.mean(grey(image, channels=1, backend=backend))


def contiguous(image: DataNode, backend: Backend) -> DataNode:
    """Make a batch that was merged from conditional branches contiguous.

    Otherwise its output is copied image by image. On a GPU so does fn.copy: 256 copies, which take 2 to 17 ms while the
    GPU is training. A slice of the whole image is one kernel.
    """
    return fn.slice(image, start=[0], rel_shape=[1.0], axes=[0]) if backend == "gpu" else fn.copy(image)


def to_uint8(image: DataNode) -> DataNode:
    """Clamp to [0, 255] and truncate by the dtype conversion of a slice: 0.14 ms (cast 0.31 ms, color_twist 0.6 ms)."""
    return fn.slice(image, start=[0], rel_shape=[1.0], axes=[0], dtype=types.UINT8)


def _permuted(image: DataNode, layout: Literal["CHW", "HWC"]) -> DataNode:
    """Permute a uint8 image of the other layout to `layout`.

    crop_mirror_normalize without normalisation takes 0.07 ms, transpose 0.22 ms.
    """
    image = fn.reinterpret(image, layout="HWC" if layout == "CHW" else "CHW")
    return fn.crop_mirror_normalize(image, dtype=types.UINT8, output_layout=layout, mean=[0.0], std=[1.0])


def as_op_argument(node: DataNode, backend: Backend) -> DataNode:
    """Move a node to CPU memory, where DALI needs the per-sample arguments of an operator."""
    return node.cpu() if backend == "gpu" else node


def as_operand(node: DataNode, backend: Backend) -> DataNode:
    """Move a node to the memory of the backend's images, for arithmetic with them or as one of them."""
    return node.gpu() if backend == "gpu" else node


def _bernoulli(probability: float) -> DataNode | None:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL) if probability > 0 else None


def _uniform_if(coin: DataNode, drawn_from: tuple[float, float], otherwise: float) -> DataNode:
    """Sample uniformly where `coin` is true, else return `otherwise`. The arithmetic keeps the sample bit-identical."""
    low, high = drawn_from
    drawn = fn.random.uniform(range=[low, high]) if low < high else low  # DALI refuses an empty range
    yes = _float(coin)
    return yes * drawn + (1.0 - yes) * otherwise


def _float(node: DataNode) -> DataNode:
    return fn.cast(node, dtype=types.FLOAT)

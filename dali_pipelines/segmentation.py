"""Images with their segmentation masks: random crops to train on, whole images to judge (paper, A.2).

An image is resized linearly and antialiased, its mask by nearest neighbour, by the same box: pixel belongs to pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dali_pipelines import photometric
from dali_pipelines.augmentation import MEAN_COLOUR, AugmentationError, ColourDefinition, Photometric
from dali_pipelines.dali import Pipeline, dali_math, fn, pipeline_def, types
from dali_pipelines.decoder import GpuDecoder
from dali_pipelines.photometric import Backend, DataNode
from dali_pipelines.reader import Source, decode, read

DISTORTION = Photometric(0.5, 32 / 255, 0.5, 0.5, 18 / 360, 0.0, 0.0, (0.1, 2.0), 0.0)
"""The strengths of MMSegmentation's PhotoMetricDistortion, in this project's order and maths. There each of the four
happens to half of the images on its own, here all four to half of them."""

LONGEST = 4
"""The longer side is resized to at most this many times what the shorter one is drawn to be."""


@dataclass(frozen=True)
class MaskCrops:
    """How an image and its mask are shown in training. Defaults are MMSegmentation's for ViTs with UPerNet.

    The image is resized so that its shorter side is `size` times a number drawn from `scale`, and a square is cut out
    anywhere. MMSegmentation's cat_max_ratio (draw again where one class fills 75% of the square) is left out.
    """

    size: int = 224
    """Side in pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    """What the shorter side is resized to, as a multiple of `size`; drawn uniformly."""
    flip_probability: float = 0.5
    colour: Photometric = DISTORTION
    """Colour ops of the image."""
    colour_definition: ColourDefinition = "linear"
    """Maths of their jitter; a run's is in its views.colour."""
    void: int = 255
    """Id, 0 to 255, of what the image does not cover: that of pixels which do not count, as the shards number them."""

    def check(self) -> None:
        """Raise AugmentationError, which names the field, where crops cannot be made so."""
        if not 0 < self.scale[0] <= self.scale[1]:
            raise AugmentationError("scale must be two rising numbers above 0")
        if not 0 <= self.flip_probability <= 1:
            raise AugmentationError(f"flip_probability {self.flip_probability} must be from 0 to 1")
        self.colour.check()
        if not 0 <= self.void <= 255:
            raise AugmentationError(f"void {self.void} must be from 0 to 255")


def masked_crops(source: Source, crops: MaskCrops, **settings: Any) -> Pipeline:
    """Outputs: images (uint8 HWC) and masks (uint8 HWC, one channel), where `backend` says; origin.

    `settings`: the keywords of `_graph` and of every DALI pipeline. Raises AugmentationError as `crops.check` does.
    """
    crops.check()
    return _graph(source, crops, **settings)


@pipeline_def(enable_conditionals=True, exec_dynamic=True, enable_checkpointing=True)
def _graph(
    source: Source,
    crops: MaskCrops,
    *,
    backend: Backend,
    shuffle_buffer: int,
    order_seed: int,
    read_ahead: int,
    decoder: GpuDecoder,
) -> tuple[DataNode, ...]:
    encoded = read(source, shuffle_buffer=shuffle_buffer, seed=order_seed, prefetch=read_ahead)
    box = _draw_box(fn.peek_image_shape(encoded.jpeg, dtype=types.FLOAT)[:2], crops)
    drawn = photometric.draw(crops.colour)
    image = _cut(decode(encoded.jpeg, backend, decoder), box, types.INTERP_LINEAR)
    shared = photometric.shared(image, backend)
    image = photometric.apply(shared, drawn, crops.colour, crops.colour_definition, backend)
    mask = _cut(_decode_mask(encoded.mask, backend), box, types.INTERP_NN)
    return _filled(image, crops.size, MEAN_COLOUR), _filled(mask, crops.size, (float(crops.void),)), encoded.origin


@pipeline_def(exec_dynamic=True)
def whole_images(source: Source, *, backend: Backend, read_ahead: int, decoder: GpuDecoder) -> tuple[DataNode, ...]:
    """Outputs: images and masks at their own size, as masked_crops; origin."""
    encoded = read(source, shuffle_buffer=0, seed=0, prefetch=read_ahead)
    return decode(encoded.jpeg, backend, decoder), _decode_mask(encoded.mask, backend), encoded.origin


def _decode_mask(png: DataNode, backend: Backend) -> DataNode:
    """The ids, uint8 HWC of one channel. On the CPU always: GPUs have no engine for PNG."""
    mask = fn.decoders.image(png, output_type=types.GRAY)
    return mask.gpu() if backend == "gpu" else mask


class _Box(NamedTuple):
    """Where a crop lies in its image; (y, x) each, FLOAT."""

    start: DataNode
    """In pixels of the image. Beyond `end` in x where the crop is flipped."""
    end: DataNode
    shape: DataNode
    """Of the crop in pixels: at most size×size, and less where the resized image is smaller."""


def _draw_box(sides: DataNode, crops: MaskCrops) -> _Box:
    """MMSegmentation's RandomResize, RandomCrop and RandomFlip of an image of these (height, width)."""
    low, high = crops.scale
    shorter = crops.size * (fn.random.uniform(range=[low, high]) if low < high else low)
    shortest, longest = fn.reductions.min(sides), fn.reductions.max(sides)
    resized = dali_math.max(1.0, _rounded(sides * dali_math.min(shorter / shortest, LONGEST * shorter / longest)))
    shape = dali_math.min(resized, float(crops.size))
    margin = resized - shape
    place = dali_math.min(margin, dali_math.floor(fn.random.uniform(range=[0.0, 1.0], shape=[2]) * (margin + 1.0)))
    start, end = place * sides / resized, (place + shape) * sides / resized
    flip = fn.cast(fn.random.coin_flip(probability=crops.flip_probability), dtype=types.FLOAT)
    across = types.Constant(np.array([0, 1], np.float32), device="cpu") * flip
    return _Box(start + across * (end - start), end + across * (start - end), shape)


def _rounded(number: DataNode) -> DataNode:
    return dali_math.floor(number + 0.5)


def _cut(image: DataNode, box: _Box, interp_type: types.DALIInterpType) -> DataNode:
    return fn.resize(image, size=box.shape, roi_start=box.start, roi_end=box.end, interp_type=interp_type)


def _filled(image: DataNode, size: int, fill: tuple[float, ...]) -> DataNode:
    """size×size, with `fill` below and to the right of the image."""
    return fn.slice(
        image,
        start=[0, 0],
        shape=[size, size],
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=list(fill),
    )

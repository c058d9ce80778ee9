"""DALI pipelines of pretraining, downstream training and evaluation.

- two_views: one crop and flip, then the photometric ops of target and source (paper, section 3 and A.1).
- labelled_crops: crop and flip, then the ops of a downstream protocol (paper, A.2).
- centre_crops: resized centre crops in order, for evaluation (paper, A.2).
- segmentation_crops, full_images: images with masks, as random crops for training and whole for evaluation (A.2).

With the same box, an image is resized linearly with antialiasing and its mask by nearest neighbour, so that their
pixels correspond.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dali_pipelines import photometric, rand_augment
from dali_pipelines.augmentations import MEAN_COLOUR, PHOTOMETRIC_FIELDS, ViewBackend
from dali_pipelines.crops import (
    CropSettings,
    Interpolation,
    RandAugment,
    SegmentationCrops,
    parse_rand_augment,
    resized_side,
)
from dali_pipelines.dali import Pipeline, dali_math, fn, pipeline_def, types
from dali_pipelines.decoder import Decoder
from dali_pipelines.geometry import INTERP_TYPES, Crop, decode_crop, decode_full, draw_crop, resize_box
from dali_pipelines.jitter import prepare
from dali_pipelines.photometric import PhotometricParams
from dali_pipelines.pixels import Backend, DataNode, as_operand, contiguous
from dali_pipelines.reader import DataSource, read
from dali_pipelines.views import Views


@pipeline_def(enable_conditionals=True, exec_dynamic=True, enable_checkpointing=True)
def two_views(
    source: DataSource,
    views: Views,
    *,
    backend: ViewBackend,
    shuffle_buffer: int,
    shuffle_seed: int,
    reader_prefetch: int,
    decoder: Decoder,
) -> tuple[DataNode, ...]:
    """Make the pipeline with outputs params (float32 [len(PARAMS)]), source, target (uint8 HWC), source_info, label.

    The label exists only where the source has a label column. source_info and label are in CPU memory, the others in
    the memory of the pipeline's device: on a GPU, `cpu` copies them there, each in one piece. In place of source and
    target, `triton` has one output, the resized crop, from which photometric_kernels.apply_views makes them.

    DALI seeds random operators in the order in which they are reached from the outputs. All of them lead to params, the
    first output, so all backends draw the same numbers.
    """
    on_gpu = Pipeline.current().device_id is not None
    device: Backend = "gpu" if on_gpu and backend != "cpu" else "cpu"
    encoded = read(source, shuffle_buffer=shuffle_buffer, seed=shuffle_seed, prefetch=reader_prefetch)
    crop = draw_crop(encoded.jpeg, views.crop_scale, views.crop_ratio, views.flip_probability)
    drawn_target = photometric.sample(views.target)
    drawn_source = photometric.sample(views.source)
    image = resize_box(decode_crop(encoded.jpeg, crop, device, decoder), crop, views.size, device)
    if backend == "triton":
        images = [image]
    else:
        shared = prepare(image, device)
        target_view = photometric.apply(shared, drawn_target, views.target, views.jitter_impl, device)
        source_view = photometric.apply(shared, drawn_source, views.source, views.jitter_impl, device)
        images = [contiguous(view, device) if on_gpu else view for view in (source_view, target_view)]
    outputs = [_params(crop, drawn_target, drawn_source), *images]
    if on_gpu:
        outputs = [output.gpu() for output in outputs]
    return (*outputs, encoded.source_info, *(() if encoded.label is None else (encoded.label,)))


def _params(crop: Crop, target: PhotometricParams, source: PhotometricParams) -> DataNode:
    """Stack all sampled parameters in the order of PARAMS."""
    geometry = (crop.start[1], crop.start[0], crop.shape[1], crop.shape[0], crop.image_shape[1], crop.image_shape[0])
    photometrics = (drawn.values[name] for drawn in (target, source) for name in PHOTOMETRIC_FIELDS)
    return fn.stack(*(fn.cast(number, dtype=types.FLOAT) for number in (*geometry, crop.flip)), *photometrics)


def labelled_crops(source: DataSource, crops: CropSettings, **settings: Any) -> Pipeline:
    """Make the pipeline with outputs images (uint8 HWC, memory of `backend`), source_info and label (CPU memory).

    `settings`: keywords of `_labelled_crops` and of every DALI pipeline. Raise AugmentationError for invalid settings,
    and ValueError for a source without labels.
    """
    crops.check()
    if source.component is None:
        raise ValueError("labelled crops need the name of a label column")
    layers = None if crops.rand_augment is None else parse_rand_augment(crops.rand_augment)
    return _labelled_crops(source, crops, layers, **settings)


@pipeline_def(enable_conditionals=True, exec_dynamic=True, enable_checkpointing=True)
def _labelled_crops(
    source: DataSource,
    crops: CropSettings,
    layers: RandAugment | None,
    *,
    backend: Backend,
    shuffle_buffer: int,
    shuffle_seed: int,
    reader_prefetch: int,
    decoder: Decoder,
) -> tuple[DataNode, ...]:
    encoded = read(source, shuffle_buffer=shuffle_buffer, seed=shuffle_seed, prefetch=reader_prefetch)
    crop = draw_crop(encoded.jpeg, crops.crop_scale, crops.crop_ratio, crops.flip_probability)
    drawn = photometric.sample(crops.photometric)
    box = decode_crop(encoded.jpeg, crop, backend, decoder)
    shared = prepare(resize_box(box, crop, crops.size, backend, crops.interpolation), backend)
    image = photometric.apply(shared, drawn, crops.photometric, crops.jitter_impl, backend)
    if layers is not None:
        drawn_layers = rand_augment.sample(layers)
        image = rand_augment.apply(image, drawn_layers, layers.increasing, crops.size, crops.interpolation, backend)
    images = contiguous(image, backend) if backend == "gpu" else image
    return images, encoded.source_info, encoded.label


@pipeline_def(exec_dynamic=True)
def centre_crops(
    source: DataSource,
    size: int,
    *,
    interpolation: Interpolation = "linear",
    backend: Backend,
    reader_prefetch: int,
    decoder: Decoder,
) -> tuple[DataNode, ...]:
    """Make the pipeline with outputs images (uint8 HWC, size×size), source_info, and label where the source has one.

    Resize the shorter side to `resized_side(size)`, with antialiasing, and crop the centre. The boxes equal those of
    torchvision's Resize and CenterCrop: sides are rounded down, margins are rounded to even.
    replay.resized_centre_crop is the same in torch.
    """
    encoded = read(source, shuffle_buffer=0, seed=0, prefetch=reader_prefetch)
    sides = fn.peek_image_shape(encoded.jpeg, dtype=types.INT32)[:2]
    resized = sides * resized_side(size) // dali_math.min(sides[0], sides[1])
    image = decode_full(encoded.jpeg, backend, decoder)
    image = fn.resize(image, size=fn.cast(resized, dtype=types.FLOAT), interp_type=INTERP_TYPES[interpolation])
    surplus = resized - size
    margin = (surplus + surplus // 2 % 2) // 2
    image = fn.slice(image, start=margin, shape=[size, size], axes=[0, 1])
    outputs = (image, encoded.source_info)
    return outputs if encoded.label is None else (*outputs, encoded.label)


LONGEST = 4
"""Maximum of the resized longer side, as a multiple of the sampled shorter side."""


def segmentation_crops(source: DataSource, crops: SegmentationCrops, **settings: Any) -> Pipeline:
    """Make the pipeline with outputs images (uint8 HWC), masks (uint8 HWC, one channel) and source_info (CPU memory).

    `settings`: keywords of `_segmentation_crops` and of every DALI pipeline. Images and masks are in the memory of its
    `backend`. Raise AugmentationError for invalid settings.
    """
    crops.check()
    return _segmentation_crops(source, crops, **settings)


@pipeline_def(enable_conditionals=True, exec_dynamic=True, enable_checkpointing=True)
def _segmentation_crops(
    source: DataSource,
    crops: SegmentationCrops,
    *,
    backend: Backend,
    shuffle_buffer: int,
    shuffle_seed: int,
    reader_prefetch: int,
    decoder: Decoder,
) -> tuple[DataNode, ...]:
    encoded = read(source, shuffle_buffer=shuffle_buffer, seed=shuffle_seed, prefetch=reader_prefetch)
    box = _draw_box(fn.peek_image_shape(encoded.jpeg, dtype=types.FLOAT)[:2], crops)
    drawn = photometric.sample(crops.photometric)
    image = _cut(decode_full(encoded.jpeg, backend, decoder), box, types.INTERP_LINEAR)
    shared = prepare(image, backend)
    image = photometric.apply(shared, drawn, crops.photometric, crops.jitter_impl, backend)
    mask = _cut(_decode_mask(encoded.mask, backend), box, types.INTERP_NN)
    return (
        _padded(image, crops.size, MEAN_COLOUR),
        _padded(mask, crops.size, (float(crops.ignore_index),)),
        encoded.source_info,
    )


@pipeline_def(exec_dynamic=True)
def full_images(
    source: DataSource, *, backend: Backend, reader_prefetch: int, decoder: Decoder
) -> tuple[DataNode, ...]:
    """Make the pipeline with outputs images, masks and source_info as in segmentation_crops, but at their full size."""
    encoded = read(source, shuffle_buffer=0, seed=0, prefetch=reader_prefetch)
    return decode_full(encoded.jpeg, backend, decoder), _decode_mask(encoded.mask, backend), encoded.source_info


def _decode_mask(png: DataNode, backend: Backend) -> DataNode:
    """Decode the class ids, uint8 HWC of one channel. Always decode on the CPU: GPUs have no PNG decoder."""
    return as_operand(fn.decoders.image(png, output_type=types.GRAY), backend)


class _Box(NamedTuple):
    """Box of a crop in its image; each field is (y, x), FLOAT."""

    start: DataNode
    """First corner (pixels of the image); its x is above that of `end` where the crop is flipped."""
    end: DataNode
    """Opposite corner (pixels of the image)."""
    shape: DataNode
    """Size of the crop (pixels): at most size×size, and less where the resized image is smaller."""


def _draw_box(sides: DataNode, crops: SegmentationCrops) -> _Box:
    """Sample MMSegmentation's RandomResize, RandomCrop and RandomFlip for an image of size `sides` (height, width)."""
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


def _padded(image: DataNode, size: int, fill: tuple[float, ...]) -> DataNode:
    """Pad an image to size×size with `fill` below and to the right."""
    return fn.slice(
        image,
        start=[0, 0],
        shape=[size, size],
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=list(fill),
    )

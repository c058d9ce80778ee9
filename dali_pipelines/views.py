"""The two-view pipeline: one crop and flip, then target and source colours (paper, section 3 and A.1)."""

from __future__ import annotations

from dali_pipelines import photometric
from dali_pipelines.augmentation import PHOTOMETRIC_FIELDS, Views
from dali_pipelines.dali import fn, pipeline_def, types
from dali_pipelines.decoder import GpuDecoder
from dali_pipelines.photometric import Backend, DataNode, Drawn
from dali_pipelines.reader import Crop, Source, decode_box, draw_crop, read, resize_box


@pipeline_def(enable_conditionals=True, exec_dynamic=True, enable_checkpointing=True)
def two_views(
    source: Source,
    views: Views,
    *,
    backend: Backend,
    shuffle_buffer: int,
    order_seed: int,
    read_ahead: int,
    decoder: GpuDecoder,
) -> tuple[DataNode, ...]:
    """Outputs: source and target (uint8 HWC), params (float32 [len(PARAMS)]), origin, and the label if one is read.

    Origin and label stay in CPU memory; the rest is where `backend` says.
    """
    encoded = read(source, shuffle_buffer=shuffle_buffer, seed=order_seed, prefetch=read_ahead)
    crop = draw_crop(encoded.jpeg, views.crop_scale, views.crop_ratio, views.flip_probability)
    drawn_target = photometric.draw(views.target)
    drawn_source = photometric.draw(views.source)
    box = decode_box(encoded.jpeg, crop, backend, decoder)
    shared = photometric.shared(resize_box(box, crop, views.size, backend), backend)
    target_view = photometric.apply(shared, drawn_target, views.target, views.colour, backend)
    source_view = photometric.apply(shared, drawn_source, views.source, views.colour, backend)
    params = _params(crop, drawn_target, drawn_source)
    if backend == "gpu":
        params = params.gpu()
    source_view, target_view = (photometric.contiguous(view, backend) for view in (source_view, target_view))
    outputs = (source_view, target_view, params, encoded.origin)
    return outputs if encoded.label is None else (*outputs, encoded.label)


def _params(crop: Crop, target: Drawn, source: Drawn) -> DataNode:
    """All drawn numbers in the order of PARAMS."""
    geometry = (crop.start[1], crop.start[0], crop.shape[1], crop.shape[0], crop.image_shape[1], crop.image_shape[0])
    photometrics = (drawn.values[name] for drawn in (target, source) for name in PHOTOMETRIC_FIELDS)
    return fn.stack(*(fn.cast(number, dtype=types.FLOAT) for number in (*geometry, crop.flip)), *photometrics)

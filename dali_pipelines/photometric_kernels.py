"""Photometric ops of both views as Triton kernels, from recorded parameters: the colours of backend `triton`.

They compute what replay.py does, in at most six launches for a batch of any size, on the current stream. Requires
Triton and a GPU, or TRITON_INTERPRET=1 (as the tests on CPUs set it).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dali_pipelines.augmentations import OPS, PARAMS, SOURCE, TARGET
from dali_pipelines.views import Views

KERNEL_OPS = ("brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize")
"""Ops that the kernels apply, in this order."""

SUMMED_PIXELS, PIXELS, BYTES = 1024, 512, 512
"""Pixels per program of the kernel for sums (eight for each thread of four warps) and of that for views (four), and
bytes per program of the kernel for blur (four). Chosen by the registers of the machine code for sm_90 (at most 72 per
thread, none spilled); not yet timed on a GPU."""


def missing_ops(views: Views) -> list[str]:
    """Return the names of the ops that these views may apply and the kernels lack."""
    specs = views.source, views.target
    return [op.name for op in OPS if op.name not in KERNEL_OPS and any(spec.applies(op) for spec in specs)]


def kernel_launches(views: Views) -> int:
    """Return the number of kernels that `apply_views` launches for a batch."""
    return 1 + _is_centred(views) + sum(2 for spec in (views.source, views.target) if spec.blur_probability > 0)


def apply_views(
    crops: UInt8[Tensor, "b h w 3"], params: Float[Tensor, "b p"], views: Views
) -> tuple[UInt8[Tensor, "b h w 3"], UInt8[Tensor, "b h w 3"]]:
    """Return source and target of each crop, by its row of params (columns as PARAMS), sampled with these `views`.

    The number of blur's taps follows the largest sigma of `views`, as in the DALI graph.
    """
    # Imported here because Triton comes only with torch's GPU builds.
    from dali_pipelines.photometric_triton import blur_kernel, grey_sums_kernel, views_kernel

    assert crops.is_contiguous()
    assert params.is_contiguous()
    assert params.shape[1] == len(PARAMS)
    batch, height, width, _ = crops.shape
    pixels = height * width
    parts, columns = _blocks(pixels, SUMMED_PIXELS), (SOURCE.start, TARGET.start)
    centred = _is_centred(views)
    jitters = max(views.source.jitter_probability, views.target.jitter_probability) > 0
    source, target = torch.empty_like(crops), torch.empty_like(crops)
    sums = crops.new_empty(batch, 2, parts, dtype=torch.int32)
    # Without fused multiply-adds every step is rounded as in the replay.
    options = {"num_warps": 4, "enable_fp_fusion": False}
    if centred:
        grey_sums_kernel[parts, batch](
            crops, params, sums, *columns, views.jitter_impl == "linear", pixels, parts, SUMMED_PIXELS, **options
        )
    views_kernel[_blocks(pixels, PIXELS), batch](
        crops, params, sums, source, target, *columns, views.jitter_impl if jitters else "none", centred,
        pixels, parts, 1 << (parts - 1).bit_length(), PIXELS, **options,
    )  # fmt: skip
    for view, first, spec in zip((source, target), columns, (views.source, views.target), strict=True):
        if spec.blur_probability > 0:
            reach, blurred_rows = math.ceil(3 * spec.blur_sigma[1]), torch.empty_like(view)
            for images, out, along_rows in ((view, blurred_rows, True), (blurred_rows, view, False)):
                blur_kernel[_blocks(3 * pixels, BYTES), batch](
                    images, params, out, first, reach, along_rows, height, width, BYTES, **options
                )
    return source, target


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _is_centred(views: Views) -> bool:
    """Return True where a view may change contrast, which needs the mean grey."""
    return any(spec.jitter_probability > 0 and spec.contrast > 0 for spec in (views.source, views.target))

"""Settings of JPEG decoding in pipelines whose images are on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DecoderDevice = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Decoder:
    """JPEG decoding for images on a GPU. Only `device` affects the decoded pixels, by rounding."""

    device: DecoderDevice = "gpu"
    """Where JPEGs are decoded: `gpu` by nvJPEG, `cpu` by threads of the pipeline, which also crop. With images of
    500×375 and 16 cores per GPU both train equally fast (docs/lab-notebook.md); `iwm bench tune` compares them."""
    hw_decoder_load: float = 0.0
    """Share of the images (0 to 1) that the GPU's JPEG engine decodes, where it has one (A100, H100). nvJPEG's kernels
    decode the others. With DALI's default, 0.65, the pipeline alone is faster, but training is not
    (docs/lab-notebook.md)."""
    width_hint: int = 1024
    """Image width for which the engine's memory is preallocated (pixels), for its share of a batch. A wider image
    causes one reallocation. In RGB, for two thirds of a batch of 1,024: 1.6 GB at 1024×768, 8.4 GB at 2048×2048."""
    height_hint: int = 768
    """Image height for which the engine's memory is preallocated (pixels)."""


DECODER = Decoder()
"""Default settings."""

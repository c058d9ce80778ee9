"""Settings of the GPU JPEG decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuDecoder:
    """JPEG decoding on a GPU. The settings affect neither the decoded pixels nor decoding on a CPU."""

    hw_decoder_load: float = 0.65
    """Share of the images (0 to 1) that the GPU's JPEG engine decodes, where it has one (A100, H100). nvJPEG's kernels
    decode the others. The default is DALI's."""
    width_hint: int = 1024
    """Image width for which memory is preallocated (pixels), for the engine's share of a batch. A wider image causes
    one reallocation. In RGB, for two thirds of a batch of 1,024: 1.6 GB at 1024×768, 8.4 GB at 2048×2048."""
    height_hint: int = 768
    """Image height for which memory is preallocated (pixels)."""


GPU_DECODER = GpuDecoder()
"""Default settings: DALI's division of the work, and memory for images of up to 1024×768."""

"""Settings of the GPU's JPEG decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuDecoder:
    """JPEG decoding on a GPU; without effect on a CPU, and on what the pixels are."""

    hw_load: float = 0.65
    """Share of the images, 0 to 1, that go to the GPU's JPEG engine where it has one (A100, H100); the rest to nvJPEG's
    kernels. DALI's default."""
    width_hint: int = 1024
    """Width that the engine gets memory for in advance, for its share of a batch (pixels); a wider image costs a
    reallocation, once. In RGB, for two thirds of a batch of 1,024: 1.6 GB at 1024×768, 8.4 GB at 2048×2048."""
    height_hint: int = 768
    """Height that the engine gets memory for in advance (pixels)."""


GPU_DECODER = GpuDecoder()
"""DALI's default division of the work, and memory for images of up to 1024×768."""

"""Conversion of Pillow's images to upright RGB; inference uses it too, so it imports no JPEG library."""

from __future__ import annotations

import struct
import zlib
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""Exceptions of Pillow's plugins on damaged files: undocumented, found in their source code and by fuzzing."""

GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes of 16-bit grey images. `I` has 32 bits; some plugins use it for 16-bit files."""


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; ignore an EXIF block that cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:
        return image


Integers = TypeVar("Integers", bound=Any)


def to_8_bits(levels: Integers) -> Integers:
    """Scale integers from 0 to 65535, of an array or tensor of at least 32 bits, to 0 to 255."""
    scaled: Integers = (levels * 255 + 32767) // 65535
    return scaled


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: scale 16-bit grey to 8 bits, put transparency on white, ignore colour profiles.

    Raise ValueError, with the reason, for pixels whose range has no defined meaning.
    """
    if image.mode in GREY_16:
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"integer pixels from {grey.min()} to {grey.max()}: only 0 to 65535 has a defined meaning")
        return Image.fromarray(to_8_bits(grey).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels: their range has no defined meaning")
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")
    return image.convert("RGB")

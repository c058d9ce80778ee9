"""Strict JPEG reading: headers, and pixels with every libjpeg warning as an error.

libjpeg only warns about a JPEG that is damaged in the middle, and Pillow, OpenCV and DALI then return a corrupted image
without an error. simplejpeg turns these warnings into errors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from shards.format import RejectedSample

START = b"\xff\xd8"
"""First two bytes of every JPEG (SOI marker)."""

_BASELINE, _EXIF, _ADOBE, _SCAN = 0xC0, 0xE1, 0xEE, 0xDA
_NO_FRAME = (0xC4, 0xC8, 0xCC)
"""Markers from 0xC0 to 0xCF that are not frame headers: Huffman tables, reserved, arithmetic coding."""
_ORIENTATION = 0x0112


class JpegHeader(NamedTuple):
    """Properties from a JPEG's header. `size` is (width, height) as stored, before the EXIF orientation."""

    size: tuple[int, int]
    colorspace: str
    """Colour space as detected by libjpeg: YCbCr, RGB, Gray, CMYK or YCCK."""
    baseline: bool
    """True for sequential Huffman coding with 8 bits per sample, as hardware decoders need; False for progressive."""
    scan_components: int
    """Number of components in the first scan; less than three where a colour image stores its channels separately."""
    orientation: int | None
    """EXIF orientation (1 to 8); 1 where there is none, None where the EXIF block cannot be read."""
    adobe: bool
    """True where Adobe's marker is present; CMYK values are then stored inverted."""

    @property
    def is_baseline_ycbcr(self) -> bool:
        """True for the form used in shards, which every decoder reads alike: baseline, one YCbCr scan, upright."""
        return self.baseline and self.colorspace == "YCbCr" and self.scan_components == 3 and self.orientation == 1


def read_header(data: bytes) -> JpegHeader:
    """Read the segments up to the first scan. Raise RejectedSample, with libjpeg's message, for an invalid header."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    except ValueError as error:
        raise RejectedSample(f"damaged or unusual JPEG: {error}") from error
    orientation: int | None = 1
    baseline, adobe = False, False
    for marker, segment in _segments(data):
        if marker == _EXIF and segment.startswith(b"Exif\0"):
            orientation = _read_orientation(segment)
        elif marker == _ADOBE and segment.startswith(b"Adobe"):
            adobe = True
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            baseline = marker == _BASELINE and segment[0] == 8
        elif marker == _SCAN:
            return JpegHeader((width, height), colorspace, baseline, segment[0], orientation, adobe)
    raise RejectedSample("damaged JPEG: no image data")


def decode(data: bytes, colorspace: str = "RGB", at_least: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w c"]:
    """Decode the whole JPEG. Raise RejectedSample, with libjpeg's message, for any damage that libjpeg detects.

    `at_least` (width, height) lets libjpeg reduce the image during decoding, by a factor of two or more, to no less
    than that size. All data is still read and checked, in a fraction of the time.
    """
    reduction = {"min_width": at_least[0], "min_height": at_least[1], "min_factor": 2} if at_least else {}
    try:
        return simplejpeg.decode_jpeg(data, colorspace, strict=True, **reduction)
    except ValueError as error:
        raise RejectedSample(f"damaged JPEG: {error}") from error


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, content) of each segment up to the first scan's header. libjpeg has validated them before."""
    position = len(START)
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without content
            position += 2
        else:
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            yield marker, data[position + 4 : end]
            position = end


def _read_orientation(segment: bytes) -> int | None:
    exif = Image.Exif()
    try:
        exif.load(segment)
        return exif.get(_ORIENTATION, 1)
    except (ValueError, SyntaxError, LookupError, TypeError, EOFError, OSError, struct.error):
        return None

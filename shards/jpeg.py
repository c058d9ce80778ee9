"""Reading JPEGs strictly: what the header says, and every pixel or a reason why not.

simplejpeg turns libjpeg's warnings into errors. A JPEG that is damaged in the middle is only warned about by libjpeg,
and Pillow, OpenCV and DALI hand over the garbage picture without a word.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from shards.rejection import Rejected

START = b"\xff\xd8"
"""The bytes with which every JPEG begins."""

_BASELINE, _EXIF, _ADOBE, _SCAN = 0xC0, 0xE1, 0xEE, 0xDA
_NO_FRAME = (0xC4, 0xC8, 0xCC)
"""Markers among the frames' numbers (0xC0 to 0xCF) that are no frames: Huffman tables, reserved, arithmetic coding."""
_ORIENTATION = 0x0112


class JpegHeader(NamedTuple):
    """What stands before the pixels. `size` is (width, height) as stored, before the EXIF orientation."""

    size: tuple[int, int]
    colorspace: str
    """As libjpeg understands it: YCbCr, RGB, Gray, CMYK or YCCK."""
    baseline: bool
    """Sequential Huffman coding with 8 bits a sample: what hardware decoders take. Progressive is not."""
    scan_components: int
    """Components in the first scan; fewer than three in a colour image that stores its channels one after another."""
    orientation: int | None
    """EXIF orientation, 1 where there is none, None where the EXIF block cannot be read."""
    adobe: bool
    """Whether Adobe's marker is there: inks are then stored inverted."""

    @property
    def is_normal(self) -> bool:
        """A JPEG as shards hold it, which every decoder reads alike: baseline, one YCbCr scan, upright."""
        return self.baseline and self.colorspace == "YCbCr" and self.scan_components == 3 and self.orientation == 1


def read_header(data: bytes) -> JpegHeader:
    """Walk the segments up to the first scan. Raises Rejected, with libjpeg's words, where they are not in order."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    except ValueError as error:
        raise Rejected(f"damaged or unusual JPEG: {error}") from error
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
    raise Rejected("damaged JPEG: no image data")


def decode(data: bytes, colorspace: str = "RGB", at_least: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w c"]:
    """Decode the whole JPEG; raises Rejected, with libjpeg's words, for any damage that libjpeg notices.

    `at_least` (width, height) lets libjpeg reduce the image while it decodes, by half or more and to no less than that:
    all data is still read and checked, at a fraction of the time.
    """
    reduction = {"min_width": at_least[0], "min_height": at_least[1], "min_factor": 2} if at_least else {}
    try:
        return simplejpeg.decode_jpeg(data, colorspace, strict=True, **reduction)
    except ValueError as error:
        raise Rejected(f"damaged JPEG: {error}") from error


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of each segment, to the first scan's header; libjpeg has found them to be in order."""
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

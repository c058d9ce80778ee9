"""An image file of any format becomes what a shard holds, a JPEG; or a reason why not."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from shards import jpeg
from shards.rejection import Rejected

RESIZED: dict[str, Any] = {"quality": 90, "colorsubsampling": "420"}
"""Encoding of a resized image. Photographs arrive with subsampled chroma; made smaller, they keep what they had."""

CONVERTED: dict[str, Any] = {"quality": 95, "colorsubsampling": "444"}
"""Encoding of an image that keeps its size but is no good baseline JPEG: near lossless, chroma at full resolution."""

UNDECODABLE = (
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
"""What Pillow's plugins raise on damaged files. They document nothing: this is what their sources and fuzzing show."""

GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes of 16-bit grey files (`I` is wider, and what some plugins open them as)."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the image upright."""


@dataclass(frozen=True)
class ImageRules:
    """What is asked of every image."""

    resize: int | None = None
    """Shorter side in pixels to which larger images are reduced (antialiased, JPEG quality 90); none is enlarged.
    None keeps every size, and the bytes of every good baseline RGB JPEG."""
    min_side: int = 16
    """Smallest shorter side in pixels; what is smaller is rejected."""
    max_pixels: int = 89_478_485
    """Largest image in pixels; what is larger is rejected before it costs memory."""


class NormalImage(NamedTuple):
    """`jpeg`: the file for the shard. `source_size` upright and as read, `size` as written: (width, height)."""

    jpeg: bytes
    source_size: tuple[int, int]
    size: tuple[int, int]


def normalise(data: bytes, rules: ImageRules) -> NormalImage:
    """Decode an image of any format that Pillow reads and give the JPEG for the shard: baseline, RGB, upright.

    A file that is one already comes back byte for byte, unless it is larger than `rules.resize`. Raises Rejected for
    what cannot be decoded whole, is below `min_side` or above `max_pixels`.
    """
    if not data:
        raise Rejected("empty file")
    return _normalise_jpeg(data, rules) if data.startswith(jpeg.START) else _normalise_other(data, rules)


def normalise_mask(data: bytes, image: NormalImage) -> bytes:
    """A segmentation mask as an 8-bit grey PNG: its values are the ids, its size is the image's (nearest neighbour).

    `data` is a palette, grey or bilevel image, drawn on the image as it is displayed. Raises Rejected for colours, for
    another size than the image's, and for ids above 255.
    """
    mask = _open(data)
    if mask.mode not in ("P", "L", "1", *GREY_16):
        raise Rejected(f"mode {mask.mode} holds colours; ids need a palette or grey image")
    if mask.size != image.source_size:
        raise Rejected("its size is {}x{}, the image's {}x{}".format(*mask.size, *image.source_size))
    ids = np.asarray(mask)
    if ids.min() < 0 or ids.max() > 255:
        raise Rejected(f"its ids go from {ids.min()} to {ids.max()}; a shard holds 0 to 255")
    encoded = io.BytesIO()
    Image.fromarray(ids.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST).save(encoded, "PNG")
    return encoded.getvalue()


def _normalise_jpeg(data: bytes, rules: ImageRules) -> NormalImage:
    header = jpeg.read_header(data)
    _check_size(header.size, rules)
    target = _target_size(header.size, rules.resize)
    # Twice the target leaves the antialiased resize enough to work with: 56 dB against reducing in one go.
    at_least = None if target == header.size else (2 * target[0], 2 * target[1])
    if header.colorspace in ("CMYK", "YCCK"):
        inks = jpeg.decode(data, "CMYK", at_least)
        image = Image.fromarray(255 - inks if header.adobe else inks, "CMYK").convert("RGB")
    else:
        pixels = jpeg.decode(data, "RGB", at_least)
        if header.is_normal and target == header.size:
            return NormalImage(data, header.size, header.size)
        image = Image.fromarray(pixels)
    sizes = (header.size, target)
    if header.orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[header.orientation])
        if header.orientation >= 5:
            sizes = (header.size[::-1], target[::-1])
    return _encode(image, *sizes)


def _normalise_other(data: bytes, rules: ImageRules) -> NormalImage:
    image = _open(data, rules)
    try:
        image = _to_rgb(_upright(image))
    except UNDECODABLE as error:
        raise Rejected(f"{image.format} of mode {image.mode} cannot be made RGB: {error}") from error
    return _encode(image, image.size, _target_size(image.size, rules.resize))


def _open(data: bytes, rules: ImageRules | None = None) -> Image.Image:
    """Open with Pillow and decode; of an animation, the first frame."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data))
            if rules:
                _check_size(image.size, rules)
            image.load()
        except UnidentifiedImageError:
            raise Rejected("not an image of a known format") from None
        except UNDECODABLE as error:
            raise Rejected(f"cannot be decoded: {error}") from error
    return image


def _check_size(size: tuple[int, int], rules: ImageRules) -> None:
    width, height = size
    if width * height > rules.max_pixels:
        raise Rejected(f"{width}x{height} is over the limit of {rules.max_pixels:,} pixels (max_pixels)")
    if min(size) < rules.min_side:
        raise Rejected(f"{width}x{height} is smaller than {rules.min_side} pixels (min_side)")


def _target_size(size: tuple[int, int], resize: int | None) -> tuple[int, int]:
    shorter = min(size)
    if resize is None or shorter <= resize:
        return size
    return round(size[0] * resize / shorter), round(size[1] * resize / shorter)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; an EXIF block that cannot be read says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except UNDECODABLE:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit grey scaled to 8 bits, what is transparent laid on white, colour profiles not applied."""
    if image.mode in GREY_16:
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise Rejected(f"integer pixels from {grey.min()} to {grey.max()}: only 0 to 65535 has a defined meaning")
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Rejected("floating-point pixels: their range has no defined meaning")
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _encode(image: Image.Image, source_size: tuple[int, int], size: tuple[int, int]) -> NormalImage:
    encoding = CONVERTED
    if size != source_size:
        image, encoding = image.resize(size, Image.Resampling.BICUBIC), RESIZED
    try:
        return NormalImage(simplejpeg.encode_jpeg(np.asarray(image), colorspace="RGB", **encoding), source_size, size)
    except ValueError as error:
        raise Rejected("{}x{} does not fit into a JPEG: {}".format(*size, error)) from error

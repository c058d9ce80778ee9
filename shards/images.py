"""Conversion of images to baseline JPEGs and of masks to 8-bit PNGs."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import PIL
import simplejpeg
from PIL import Image, UnidentifiedImageError

from shards import jpeg
from shards.format import RejectedSample
from shards.rgb import DECODE_ERRORS, GREY_16, to_rgb, upright

RESIZED: dict[str, Any] = {"quality": 90, "colorsubsampling": "420"}
"""Encoding of a resized image. Most photographs are stored with subsampled chroma already."""

CONVERTED: dict[str, Any] = {"quality": 95, "colorsubsampling": "444"}
"""Encoding of an image that keeps its size but needs conversion: near lossless, chroma at full resolution."""


def codec_versions() -> dict[str, str]:
    """Return the versions of the packages on which the bytes of images depend."""
    return {"pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__, "numpy": np.__version__}


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → transposition to the upright image."""


@dataclass(frozen=True)
class ImageOptions:
    """Resizing and size limits of images."""

    resize: int | None = None
    """Shorter side (pixels) to which larger images are reduced, antialiased, with JPEG quality 90.
    Smaller images are not enlarged.
    None keeps every size, and every upright baseline YCbCr JPEG byte for byte."""
    min_side: int = 16
    """Minimum of the shorter side (pixels); smaller images are rejected."""
    max_pixels: int = 89_478_485
    """Maximum of width × height (pixels); larger images are rejected before they are decoded."""


class EncodedImage(NamedTuple):
    """`jpeg`: the encoded file. Upright (width, height) of the image: `source_size` as read, `size` as written."""

    jpeg: bytes
    source_size: tuple[int, int]
    size: tuple[int, int]


def to_baseline_jpeg(data: bytes, rules: ImageOptions) -> EncodedImage:
    """Convert an image of any format that Pillow reads to an upright, baseline JPEG with YCbCr colours.

    A file that is such a JPEG is returned byte for byte, unless its shorter side is above `rules.resize`. Raise
    RejectedSample for an image that cannot be decoded completely, is below `min_side` or above `max_pixels`.
    """
    if not data:
        raise RejectedSample("empty file")
    return _jpeg_to_baseline(data, rules) if data.startswith(jpeg.START) else _decoded_to_baseline(data, rules)


def to_png_mask(data: bytes, image: EncodedImage) -> bytes:
    """Convert a segmentation mask to an 8-bit grey PNG of class ids, resized to `image.size` by nearest neighbour.

    `data` is a palette, grey or bilevel image that matches the upright source image. Raise RejectedSample for colours,
    for a size other than `image.source_size`, and for ids outside 0 to 255.
    """
    mask = _open(data)
    if mask.mode not in ("P", "L", "1", *GREY_16):
        raise RejectedSample(f"mode {mask.mode} has colours; ids need a palette or grey image")
    if mask.size != image.source_size:
        raise RejectedSample("its size is {}x{}, the image's {}x{}".format(*mask.size, *image.source_size))
    ids = np.asarray(mask)
    if ids.min() < 0 or ids.max() > 255:
        raise RejectedSample(f"its ids are {ids.min()} to {ids.max()}; they must be from 0 to 255")
    encoded = io.BytesIO()
    Image.fromarray(ids.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST).save(encoded, "PNG")
    return encoded.getvalue()


def _jpeg_to_baseline(data: bytes, rules: ImageOptions) -> EncodedImage:
    header = jpeg.read_header(data)
    _check_size(header.size, rules)
    target = _target_size(header.size, rules.resize)
    # libjpeg reduces to no less than twice the target; the antialiased resize then differs little: 56 dB PSNR.
    at_least = None if target == header.size else (2 * target[0], 2 * target[1])
    if header.colorspace in ("CMYK", "YCCK"):
        inks = jpeg.decode(data, "CMYK", at_least)
        image = Image.fromarray(255 - inks if header.adobe else inks, "CMYK").convert("RGB")
    else:
        pixels = jpeg.decode(data, "RGB", at_least)
        if header.is_baseline_ycbcr and target == header.size:
            return EncodedImage(data, header.size, header.size)
        image = Image.fromarray(pixels)
    sizes = (header.size, target)
    if header.orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[header.orientation])
        if header.orientation >= 5:
            sizes = (header.size[::-1], target[::-1])
    return _encode(image, *sizes)


def _decoded_to_baseline(data: bytes, rules: ImageOptions) -> EncodedImage:
    image = _open(data, rules)
    try:
        image = to_rgb(upright(image))
    except DECODE_ERRORS as error:
        raise RejectedSample(f"{image.format} of mode {image.mode} cannot be made RGB: {error}") from error
    return _encode(image, image.size, _target_size(image.size, rules.resize))


def _open(data: bytes, rules: ImageOptions | None = None) -> Image.Image:
    """Open an image with Pillow and decode it; of an animation, decode the first frame."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data))
            if rules:
                _check_size(image.size, rules)
            image.load()
        except UnidentifiedImageError:
            raise RejectedSample("not an image of a known format") from None
        except DECODE_ERRORS as error:
            raise RejectedSample(f"cannot be decoded: {error}") from error
    return image


def _check_size(size: tuple[int, int], rules: ImageOptions) -> None:
    width, height = size
    if width * height > rules.max_pixels:
        raise RejectedSample(f"{width}x{height} is over the limit of {rules.max_pixels:,} pixels (max_pixels)")
    if min(size) < rules.min_side:
        raise RejectedSample(f"{width}x{height} is smaller than {rules.min_side} pixels (min_side)")


def _target_size(size: tuple[int, int], resize: int | None) -> tuple[int, int]:
    shorter = min(size)
    if resize is None or shorter <= resize:
        return size
    return round(size[0] * resize / shorter), round(size[1] * resize / shorter)


def _encode(image: Image.Image, source_size: tuple[int, int], size: tuple[int, int]) -> EncodedImage:
    encoding = CONVERTED
    if size != source_size:
        image, encoding = image.resize(size, Image.Resampling.BICUBIC), RESIZED
    try:
        return EncodedImage(simplejpeg.encode_jpeg(np.asarray(image), colorspace="RGB", **encoding), source_size, size)
    except ValueError as error:
        raise RejectedSample("{}x{} does not fit into a JPEG: {}".format(*size, error)) from error

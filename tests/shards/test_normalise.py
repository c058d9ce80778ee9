"""Conversion of images: an accurate baseline JPEG, or a rejection with its reason."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from shard_sources import encoded, jpeg, photo

from shards.format import RejectedSample
from shards.images import ImageOptions, to_baseline_jpeg, to_png_mask
from shards.jpeg import read_header

RULES = ImageOptions()


def pixels(data: bytes | Image.Image) -> np.ndarray:
    image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))
    return np.asarray(image.convert("RGB")).astype(int)


def difference(a: bytes | Image.Image, b: bytes | Image.Image) -> float:
    assert pixels(a).shape == pixels(b).shape
    return float(np.abs(pixels(a) - pixels(b)).mean())


def entropy_start(data: bytes) -> int:
    """Return the offset of a JPEG's entropy-coded data (bytes)."""
    scan = data.index(b"\xff\xda")
    return scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("orientation", [None, 1])
def test_a_good_baseline_jpeg_keeps_its_bytes(subsampling, orientation):
    extra = {"exif": exif(orientation)} if orientation else {}
    data = encoded(photo(), subsampling=subsampling, quality=90, **extra)
    assert to_baseline_jpeg(data, RULES).jpeg == data


def test_bytes_after_the_end_of_a_jpeg_are_kept_with_it():
    data = jpeg() + b"a second picture, as phones append"
    assert to_baseline_jpeg(data, RULES).jpeg == data


def test_a_progressive_jpeg_becomes_baseline():
    data = encoded(photo(), progressive=True, quality=95)
    result = to_baseline_jpeg(data, RULES)
    assert read_header(result.jpeg).is_baseline_ycbcr
    assert not read_header(data).is_baseline_ycbcr
    assert difference(result.jpeg, data) < 1.5


def test_a_jpeg_that_stores_rgb_becomes_ycbcr():
    data = encoded(photo(), keep_rgb=True, quality=95)
    result = to_baseline_jpeg(data, RULES)
    assert result.jpeg != data
    assert read_header(result.jpeg).is_baseline_ycbcr
    assert difference(result.jpeg, data) < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(kind, orientation):
    data = encoded(photo(), kind, exif=exif(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    result = to_baseline_jpeg(data, RULES)
    assert result.size == result.source_size == upright.size
    assert difference(result.jpeg, upright) < 2
    assert read_header(result.jpeg).orientation == 1


def test_an_unreadable_exif_block_is_dropped_with_the_file_converted():
    good = jpeg()
    data = good[:2] + b"\xff\xe1" + struct.pack(">H", 14) + b"Exif\0\0MM\0\x2b\xff\xff" + good[2:]
    result = to_baseline_jpeg(data, RULES)
    assert result.jpeg != data
    assert read_header(result.jpeg).is_baseline_ycbcr
    assert difference(result.jpeg, good) < 2


def test_inks_become_rgb_whether_adobe_inverted_them_or_not():
    image = photo().convert("CMYK")
    adobe = encoded(image, quality=95)
    marker = adobe.index(b"\xff\xee")
    plain = adobe[:marker] + adobe[marker + 2 + int.from_bytes(adobe[marker + 2 : marker + 4], "big") :]
    assert difference(to_baseline_jpeg(adobe, RULES).jpeg, image.convert("RGB")) < 3
    negative = Image.fromarray(255 - np.asarray(image), "CMYK")
    assert difference(to_baseline_jpeg(plain, RULES).jpeg, negative.convert("RGB")) < 6


Image.init()
HAS_AVIF = "AVIF" in Image.SAVE
AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not HAS_AVIF, reason="this Pillow has no AVIF; 11.3 and newer do"))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "JPEG2000", AVIF, "ICO", "PCX"])
def test_other_formats_become_jpegs_of_the_same_picture(kind):
    image = photo(size=(64, 64))
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    result = to_baseline_jpeg(data, RULES)
    assert read_header(result.jpeg).is_baseline_ycbcr
    assert difference(result.jpeg, data) < (8 if kind == "GIF" else 2.5)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB"])
def test_every_mode_becomes_rgb(mode):
    image = photo().convert(mode)
    result = to_baseline_jpeg(encoded(image, "PNG"), RULES)
    assert read_header(result.jpeg).is_baseline_ycbcr
    assert difference(result.jpeg, image.convert("RGB")) < (8 if mode in "1P" else 2.5)


def test_a_grey_jpeg_becomes_three_channels():
    data = encoded(photo().convert("L"), quality=95)
    result = to_baseline_jpeg(data, RULES)
    assert read_header(result.jpeg).is_baseline_ycbcr
    assert difference(result.jpeg, data) < 1.5


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 80 * 60).astype(np.uint16).reshape(60, 80)
    result = pixels(to_baseline_jpeg(encoded(Image.fromarray(ramp), kind), RULES).jpeg)
    assert np.abs(result - np.round(ramp / 257)[..., None]).mean() < 1.5


def test_what_is_transparent_is_laid_on_white():
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:16] = (200, 30, 30, 255)
    result = pixels(to_baseline_jpeg(encoded(Image.fromarray(rgba), "PNG"), RULES).jpeg)
    assert result[24:].min() > 250
    assert np.abs(result[4:12] - (200, 30, 30)).max() < 6


def test_a_palette_with_transparency_is_laid_on_white():
    image = Image.new("P", (32, 32), 1)
    image.putpalette([200, 30, 30, 0, 0, 0])
    image.paste(0, (0, 0, 32, 16))
    result = pixels(to_baseline_jpeg(encoded(image, "PNG", transparency=1), RULES).jpeg)
    assert result[24:].min() > 250
    assert np.abs(result[4:12] - (200, 30, 30)).max() < 6


def test_an_animation_gives_its_first_frame():
    first, second = photo(1).quantize(), photo(2).quantize()
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert difference(to_baseline_jpeg(data, RULES).jpeg, first) < 8


def test_resize_brings_the_shorter_side_to_size_and_never_enlarges():
    assert to_baseline_jpeg(jpeg(size=(300, 200)), ImageOptions(resize=100)).size == (150, 100)
    assert to_baseline_jpeg(jpeg(size=(200, 300)), ImageOptions(resize=100)).size == (100, 150)
    small = jpeg(size=(120, 90))
    assert to_baseline_jpeg(small, ImageOptions(resize=100)).jpeg == small
    assert to_baseline_jpeg(encoded(photo(), "PNG"), ImageOptions(resize=100)).size == (80, 60)


def test_resize_after_orientation_turns_the_size_too():
    data = encoded(photo(size=(300, 200)), exif=exif(6))
    assert to_baseline_jpeg(data, ImageOptions(resize=100)).size == (100, 150)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_resize_is_antialiased(kind):
    checks = Image.fromarray((np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    result = pixels(to_baseline_jpeg(encoded(checks, kind), ImageOptions(resize=64)).jpeg)
    assert np.abs(result - 127.5).max() < 4


def test_resizing_while_decoding_changes_nothing_one_can_see():
    image = photo(size=(1200, 900))
    data = encoded(image, quality=95)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    reduced, direct = (to_baseline_jpeg(source, ImageOptions(resize=128)) for source in (data, encoded(whole, "PNG")))
    assert reduced.size == direct.size
    assert difference(reduced.jpeg, direct.jpeg) < 1.5


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_jpeg_cut_off_anywhere_is_rejected(part, progressive):
    data = encoded(photo(size=(200, 150)), quality=92, progressive=progressive)
    begin = entropy_start(data)
    with pytest.raises(RejectedSample, match="JPEG"):
        to_baseline_jpeg(data[: begin + int(part * (len(data) - begin))], RULES)


def test_a_jpeg_without_its_end_mark_is_rejected():
    with pytest.raises(RejectedSample, match="Premature end"):
        to_baseline_jpeg(jpeg()[:-2], RULES)


@pytest.mark.parametrize("resize", [None, 64])
def test_jpegs_damaged_in_the_middle_are_rejected_where_pillow_says_nothing(resize):
    """Zero 512 bytes, like a lost disk block. Some results decode to the right number of blocks and look undamaged."""
    generator = random.Random(0)
    noticed = by_pillow = 0
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)))
    for _ in range(40):
        place = generator.randrange(entropy_start(data), len(data) - 600)
        damaged = data[:place] + bytes(512) + data[place + 512 :]
        try:
            to_baseline_jpeg(damaged, ImageOptions(resize=resize))
        except RejectedSample:
            noticed += 1
        try:
            Image.open(io.BytesIO(damaged)).load()
        except OSError:
            by_pillow += 1
    assert noticed >= 36
    assert by_pillow <= 4


@pytest.mark.parametrize(
    "data", [b"", b"hello, this is text\n" * 50, b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_rejected(data):
    with pytest.raises(RejectedSample):
        to_baseline_jpeg(data, RULES)


def test_a_cut_off_png_is_rejected():
    data = encoded(photo(), "PNG")
    for end in (len(data) // 2, len(data) - 30):
        with pytest.raises(RejectedSample):
            to_baseline_jpeg(data[:end], RULES)


def test_a_png_with_a_wrong_checksum_is_rejected():
    data = bytearray(encoded(photo(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(RejectedSample):
        to_baseline_jpeg(bytes(data), RULES)


def test_decompression_bombs_are_rejected_before_they_are_decoded():
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    pixel_data = b"IDAT" + zlib.compress(b"")
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, pixel_data, b"IEND")
    )
    bomb = bytearray(jpeg())
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    for data in (png, bytes(bomb)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RejectedSample, match=r"pixels|limit|bomb"):
                to_baseline_jpeg(data, RULES)
    with pytest.raises(RejectedSample, match="max_pixels"):
        to_baseline_jpeg(jpeg(size=(80, 60)), ImageOptions(max_pixels=80 * 60 - 1))


def test_images_below_the_smallest_side_are_rejected():
    assert to_baseline_jpeg(jpeg(size=(16, 40)), RULES).size == (16, 40)
    for data in (jpeg(size=(15, 40)), encoded(photo(size=(40, 15)), "PNG")):
        with pytest.raises(RejectedSample, match="min_side"):
            to_baseline_jpeg(data, RULES)


def test_pixels_without_a_defined_range_are_rejected():
    with pytest.raises(RejectedSample, match="floating-point"):
        to_baseline_jpeg(encoded(Image.new("F", (32, 32), 0.5), "TIFF"), RULES)
    with pytest.raises(RejectedSample, match="65535"):
        to_baseline_jpeg(encoded(Image.new("I", (32, 32), 1_000_000), "TIFF"), RULES)


def test_an_image_too_long_for_a_jpeg_is_rejected():
    with pytest.raises(RejectedSample, match="70000x16"):
        to_baseline_jpeg(encoded(Image.new("RGB", (70_000, 16)), "PNG"), RULES)


def test_damage_of_any_kind_ends_in_a_jpeg_or_a_rejection():
    generator = random.Random(0)
    kinds = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "TGA", "PPM", "ICO", "PCX", "DDS", "ICNS")
    for kind in (*kinds, *(["AVIF"] if HAS_AVIF else [])):
        good = encoded(photo(size=(64, 64)), kind)
        for _ in range(30):
            data = bytearray(good)
            for _ in range(generator.randrange(1, 6)):
                data[generator.randrange(min(len(data), generator.choice((60, 10**9))))] = generator.randrange(256)
            try:
                result = to_baseline_jpeg(
                    bytes(data[: generator.choice((len(data), generator.randrange(len(data))))]), RULES
                )
            except RejectedSample:
                continue
            assert read_header(result.jpeg).is_baseline_ycbcr


@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_a_mask_keeps_its_ids_and_takes_the_images_size(mode):
    ids = np.kron(np.array([[0, 1], [7, 250]], np.uint8), np.ones((100, 150), np.uint8))
    mask = Image.fromarray(ids.astype(np.uint16)) if mode == "I;16" else Image.fromarray(ids)
    if mode == "P":
        mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image = to_baseline_jpeg(jpeg(size=(300, 200)), ImageOptions(resize=50))
    result = Image.open(io.BytesIO(to_png_mask(encoded(mask, "PNG"), image)))
    assert result.mode == "L"
    assert np.array_equal(np.asarray(result), ids[2::4, 2::4])


def test_masks_that_hold_no_ids_of_the_image_are_rejected():
    image = to_baseline_jpeg(jpeg(size=(80, 60)), RULES)
    big = Image.fromarray(np.full((60, 80), 300, np.uint16))
    for mask, reason in ((photo(), "colours"), (Image.new("L", (60, 80)), "size"), (big, "255")):
        with pytest.raises(RejectedSample, match=reason):
            to_png_mask(encoded(mask, "PNG"), image)

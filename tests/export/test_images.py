"""Images for inference: every kind of image gives the same pixels, and what could mean two things is refused."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import iwm
from iwm.config import Config, ConfigError
from iwm.evaluation.common import first_images
from iwm.export.images import Images, to_pixels
from shards.format import RejectedSample
from shards.images import ImageOptions, to_baseline_jpeg

CPU = torch.device("cpu")


def photo(height: int = 48, width: int = 60) -> Image.Image:
    """Return a smooth image with noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    ramp = 255 * (rows * rng.uniform(size=3) + columns * rng.uniform(size=3)) / 2
    return Image.fromarray((ramp + rng.uniform(0, 12, (height, width, 3))).astype(np.uint8))


def pixels(images: Images, size: int | None = None, resize: bool = True) -> Tensor:
    return to_pixels(images, CPU, size, resize)


HWC = np.asarray(photo())
FLOAT = HWC.astype(np.float64) / 255
TENSOR = torch.tensor(HWC)


@pytest.mark.parametrize(
    "same",
    [
        photo(),
        HWC,
        HWC.transpose(2, 0, 1),
        HWC[None],
        HWC.transpose(2, 0, 1)[None],
        HWC[..., ::-1][..., ::-1],
        HWC.astype(np.uint16) * 257,
        (HWC.astype(np.uint16) * 257).astype(">u2"),
        FLOAT,
        FLOAT.astype(np.float32),
        FLOAT.astype(np.float16),
        FLOAT.astype(">f4"),
        FLOAT.transpose(2, 0, 1),
        TENSOR,
        TENSOR.permute(2, 0, 1),
        TENSOR.permute(2, 0, 1) / 255,
        TENSOR.permute(2, 0, 1).double() / 255,
        (TENSOR / 255).half(),
        (TENSOR / 255).requires_grad_(),
        (TENSOR.int() * 257).to(torch.uint16),
        [photo()],
        (HWC,),
        iter([TENSOR]),
    ],
)
def test_every_kind_of_an_image_has_the_same_pixels(same: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of torch, about arrays that it must not write to
        made = pixels(same)
    assert made.dtype == torch.uint8
    assert made.is_contiguous()
    assert torch.equal(made, TENSOR[None])


def test_bfloat16_differs_by_its_own_rounding() -> None:
    assert (pixels((TENSOR / 255).bfloat16()).int() - TENSOR.int()).abs().max() <= 1


def test_pixels_of_the_models_size_are_not_changed() -> None:
    noise = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    for given in (noise, noise.permute(0, 3, 1, 2) / 255, list(noise), [Image.fromarray(a) for a in noise.numpy()]):
        assert torch.equal(pixels(given, 32), noise)
    assert pixels(noise, 32).data_ptr() == noise.data_ptr()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "La"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_files_and_pil_images_become_rgb_as_shards_do(mode: str, orientation: int, tmp_path: Path) -> None:
    image = photo()
    if mode in ("LA", "La", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image = image.convert("LA") if mode == "La" else image
    image = Image.fromarray(HWC[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if mode == "La":
        expected = pixels(image.convert("LA"))
        assert (pixels(image).int() - expected.int()).abs().max() <= 2
        return
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path, exif=exif)
    stored = Image.open(io.BytesIO(to_baseline_jpeg(path.read_bytes(), ImageOptions()).jpeg))
    made = pixels(path)
    assert made.shape[1:3] == ((60, 48) if orientation == 6 else (48, 60))
    assert (made[0].int() - torch.tensor(np.asarray(stored)).int()).abs().float().mean() < 4  # quality 95
    assert torch.equal(pixels(str(path)), made)
    assert torch.equal(pixels(Image.open(path)), made)


def png_of_16_bits(path: Path, image: np.ndarray) -> None:
    """Write a colour PNG of 16 bits, which Pillow cannot: image, uint16 [h, w, 3]."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


WIDE = HWC.astype(np.uint16) * 257
FIVE = np.concatenate([HWC, HWC[..., :2]], axis=-1)
EIGHT = np.concatenate([FIVE, HWC], axis=-1)


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("colour.png", lambda path: png_of_16_bits(path, WIDE), HWC),
        ("colour.tif", lambda path: tifffile.imwrite(path, WIDE, photometric="rgb"), HWC),
        ("grey.tif", lambda path: tifffile.imwrite(path, WIDE[..., 0]), HWC[..., :1].repeat(3, -1)),
        ("12_bits.tif", lambda path: tifffile.imwrite(path, WIDE[..., 0] >> 4), HWC[..., :1].repeat(3, -1) / 16),
        ("five.tif", lambda path: tifffile.imwrite(path, FIVE, photometric="rgb"), HWC),
    ],
)
def test_files_of_16_bits_and_of_more_channels_are_what_the_documentation_says(
    name: str, write: Callable[[Path], None], expected: np.ndarray, tmp_path: Path
) -> None:
    write(tmp_path / name)
    made = pixels(tmp_path / name)[0].numpy()
    assert np.abs(made - expected.astype(float)).max() <= 1
    stored = Image.open(io.BytesIO(to_baseline_jpeg((tmp_path / name).read_bytes(), ImageOptions()).jpeg))
    assert np.abs(np.asarray(stored) - expected.astype(float)).mean() < 4  # quality 95


@pytest.mark.parametrize(
    ("image", "told", "rejected"),
    [
        (EIGHT, "not an image of a format that Pillow reads", "not an image of a known format"),
        (WIDE.astype(np.float32)[..., 0], "floating-point pixels", "floating-point pixels"),
        (WIDE.astype(np.int32)[..., 0] * 4, "only 0 to 65535", "only 0 to 65535"),
    ],
)
def test_files_without_a_defined_meaning_are_refused(
    image: np.ndarray, told: str, rejected: str, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb" if image.ndim == 3 else "minisblack")
    with pytest.raises(ConfigError, match=told):
        pixels(tmp_path / "a.tif")
    with pytest.raises(RejectedSample, match=rejected):
        to_baseline_jpeg((tmp_path / "a.tif").read_bytes(), ImageOptions())


def test_grey_is_repeated_and_transparency_is_on_white() -> None:
    grey = HWC[..., 0]
    for given in (grey, grey[..., None], grey[None], torch.tensor(grey)[None, None], Image.fromarray(grey)):
        assert torch.equal(pixels(given), torch.tensor(grey)[None, ..., None].expand(-1, -1, -1, 3))
    assert torch.equal(pixels(grey.astype(np.uint16) * 257), pixels(grey))
    image = photo()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    rgba = np.asarray(image)
    for made in (pixels(rgba), pixels(rgba.transpose(2, 0, 1)), pixels(rgba / 255)):
        assert (made.int() - pixels(image).int()).abs().max() <= 1


def test_images_are_those_of_the_evaluation(run: Path, small: Config, boxes: Path, tmp_path: Path) -> None:
    expected, keys = first_images(boxes, "val", size=32, most=6, device=CPU)
    source = boxes.parent
    model = iwm.load(run)
    for given in (
        [source / f"{unquote(key)}.jpg" for key in keys],
        np.stack([np.asarray(Image.open(source / f"{unquote(key)}.jpg")) for key in keys]),
    ):
        difference = (model.pixels(given).int() - expected.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() <= 0.001


def test_a_list_may_mix_sizes_and_kinds(tmp_path: Path) -> None:
    small, wide = photo(40, 40), photo(30, 90)
    small.save(tmp_path / "small.png")
    together = pixels([wide, tmp_path / "small.png", HWC, TENSOR.permute(2, 0, 1) / 255], 32)
    assert together.shape == (4, 32, 32, 3)
    assert torch.equal(together, torch.cat([pixels(given, 32) for given in (wide, small, photo(), photo())]))
    with pytest.raises(ConfigError, match=r"images\[1\]: one batch cannot have images of 30 × 90 and 40 × 40 \(height"):
        pixels([wide, small])


@pytest.mark.parametrize(("height", "width"), [(32, 33), (100, 20), (20, 300), (1, 7), (16, 16)])
def test_any_size_is_resized_or_refused(height: int, width: int) -> None:
    image = photo(height, width)
    assert pixels(image, 32).shape == (1, 32, 32, 3)
    with pytest.raises(ConfigError, match=rf"height {height}, width {width}; .* 32 × 32 px .* resize=True"):
        pixels(image, 32, resize=False)
    assert torch.equal(pixels(photo(32, 32), 32, resize=False), pixels(photo(32, 32)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_on_a_gpu_a_batch_stays_there_and_is_resized_in_one_call(dtype: torch.dtype) -> None:
    ran: list[str] = []

    class Placement(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                assert out.device.type == "cuda", func
                ran.append(str(func))
            return out

    with FakeTensorMode(), Placement():
        images = torch.empty(4, 3, 300, 200, dtype=dtype, device="cuda")
        made = to_pixels(images, images.device, 32)
    assert made.shape == (4, 32, 32, 3)
    assert sum("upsample" in name for name in ran) == 1


def damaged(folder: Path) -> Path:
    whole = io.BytesIO()
    photo(200, 200).save(whole, "PNG")
    path = folder / "half.png"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    return path


def text(folder: Path) -> Path:
    (folder / "notes.txt").write_text("no image")
    return folder / "notes.txt"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: folder / "cat.jpg", r"images: .*/cat.jpg does not exist"),
        (lambda folder: [photo(), str(folder / "cat.jpg")], r"images\[1\]: .*/cat.jpg does not exist"),
        (lambda folder: folder, r"is a folder; give its files, as sorted\(Path"),
        (text, r"notes.txt is not an image of a format that Pillow reads"),
        (damaged, r"half.png: an image of mode RGB cannot become RGB"),
        (lambda _: "a\0b.jpg", r"cannot be read"),
        (lambda _: [], r"the list is empty"),
        (lambda _: None, r"None is not an image; give a path, a PIL image, a numpy array, a torch tensor, or a list"),
        (lambda _: b"\xff\xd8", r"PIL.Image.open\(io.BytesIO"),
        (lambda _: {"pixel_values": HWC}, r"dict is not an image"),
        (lambda _: [HWC, None], r"images\[1\]: None is not an image"),
        (lambda _: [HWC[None], torch.zeros(1)], r"images\[0\]: \[1, 48, 60, 3\] is a batch in a list"),
        (lambda _: [[0.0, 1.0]], r"images\[0\]: list is not an image"),
        (lambda _: Image.new("F", (9, 9)), r"floating-point pixels"),
        (lambda _: Image.new("I", (9, 9), 70000), r"integer pixels from 70000"),
        (lambda _: HWC[:3, :3], r"uint8 \[3, 3, 3\] may have its channels first or last; give PIL images"),
        (lambda _: np.zeros((2, 3, 50, 3), np.uint8), r"may have its channels first or last"),
        (lambda _: np.zeros((1, 50, 3), np.uint8), r"may have its channels first or last"),
        (lambda _: np.zeros((2, 50, 50, 2), np.uint8), r"uint8 \[2, 50, 50, 2\] is no image; .* 1 \(grey\), 3 \(RGB\)"),
        (lambda _: np.zeros((50, 60, 70)), r"float64 \[50, 60, 70\] is no image; give \[h, w\], \[h, w, c\]"),
        (lambda _: torch.zeros(3), r"float32 \[3\] is no image"),
        (lambda _: np.zeros((1, 1, 9, 9, 3), np.uint8), r"is no image"),
        (lambda _: np.zeros((0, 9, 3), np.uint8), r"has no pixels"),
        (lambda _: HWC.astype(np.int64), r"int64 \[48, 60, 3\]; give uint8 from 0 to 255"),
        (lambda _: torch.tensor(HWC).long(), r"int64 \[1, 48, 60, 3\]; give uint8"),
        (lambda _: HWC > 100, r"bool \[48, 60, 3\]; give uint8"),
        (lambda _: np.array(["a.jpg", "b.jpg"]), r"give uint8"),
        (lambda _: HWC.astype(np.float32), r"values up to \d+ in a float array: divide by 255, or use uint8"),
        (lambda _: FLOAT * 1.02 * 255 / HWC.max(), r"values from .* to 1.02 in a float array; clip them to 0 to 1"),
        (lambda _: FLOAT * 65535, r"scale them to 0 to 1"),
        (lambda _: (FLOAT - 0.45) / 0.22, r"look normalised; give values from 0 to 1"),
        (lambda _: 2 * FLOAT - 1, r"look normalised"),
        (lambda _: FLOAT * np.nan, r"values are NaN"),
        (lambda _: FLOAT + np.inf, r"up to inf in a float array"),
    ],
)
def test_one_line_tells_what_is_wrong_with_an_image(make: Callable[[Path], Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        pixels(make(tmp_path), 32)
    assert re.fullmatch(r"images(\[\d+\])?: [^\n]+", str(caught.value))


def test_remedies_are_accepted(tmp_path: Path) -> None:
    tiny = HWC[:3, :3]
    assert torch.equal(pixels(Image.fromarray(tiny)), torch.tensor(tiny)[None])
    large = HWC.astype(np.float32)
    assert torch.equal(pixels(large / 255), pixels(HWC))
    photo().save(tmp_path / "a.png")
    assert torch.equal(pixels(sorted(tmp_path.glob("*.png"))), pixels(HWC))
    data = (tmp_path / "a.png").read_bytes()
    assert torch.equal(pixels(Image.open(io.BytesIO(data))), pixels(HWC))


def test_one_image_is_a_batch_of_one_for_every_method(run: Path) -> None:
    model, image = iwm.load(run), photo(70, 50)
    assert model.pixels(image).shape == (1, 32, 32, 3)
    assert model.features(image).shape == (1, 16, 32)
    assert model.targets(image).shape == model.predict(image).shape == (1, 16, 32)
    actions = torch.stack([model.action(brightness=0.1), model.action(hue=0.1)])
    assert model.predict(image, actions).shape == (2, 16, 32)
    assert torch.equal(model(image), model.pooled(image))
    assert torch.equal(model(image), model.features(model.pixels(image)).mean(1))


def test_a_model_loaded_so_refuses_to_resize(run: Path) -> None:
    model = iwm.load(run, resize=False)
    with pytest.raises(ConfigError, match="height 48, width 60; this model takes 32 × 32 px"):
        model.features(photo())
    assert model.features(photo(32, 32)).shape == (1, 16, 32)

"""Pixels of images for inference, from files, PIL images, arrays and tensors.

Files and PIL images become upright RGB as tools/make_shards.py makes them. Arrays and tensors are uint8 or uint16, or
float from 0 to 1, with one (grey), three (RGB) or four (RGBA) channels, first or last. What could mean two things is
refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch
from jaxtyping import Real, UInt8
from torch import Tensor

from dali_pipelines.crops import Interpolation
from dali_pipelines.replay import resized_centre_crop
from iwm.config import ConfigError
from shards.errors import one_line
from shards.rgb import DECODE_ERRORS, to_8_bits, to_rgb, upright

Image: TypeAlias = str | os.PathLike[str] | PIL.Image.Image | np.ndarray | Tensor
Images: TypeAlias = Image | Iterable[Image]
"""One image, a batch (array or tensor of four axes), or a list of images, which may differ in kind and size."""

KINDS = "a path, a PIL image, a numpy array, a torch tensor, or a list of them"
CHANNELS = (1, 3, 4)
"""Numbers of channels: grey, RGB, RGBA."""


def to_pixels(
    images: Images,
    device: torch.device,
    size: int | None,
    resize: bool = True,
    interpolation: Interpolation = "linear",
) -> UInt8[Tensor, "b h w 3"]:
    """Return images as pixels on `device`; one image gives a batch of one.

    size: side that images are resized and cropped to as held-out images are in evaluation (`resized_centre_crop`),
    except for images of that size, whose pixels are not changed. resize: False refuses other sizes. size None: images
    keep their size, which must then be the same for all. Images that are on a device already are converted there; a
    batch is resized in one call, with `interpolation`, the images of a list one after another. Raises ConfigError for
    what is no image, cannot be read, or could mean two things.
    """
    if isinstance(images, str | os.PathLike | PIL.Image.Image | np.ndarray | Tensor):
        return _fit(_read(images, "images").to(device), size, resize, interpolation, "images").contiguous()
    if not isinstance(images, Iterable) or isinstance(images, bytes | Mapping):
        raise ConfigError(f"images: {_described(images)}; give {KINDS}")
    fitted = [
        _fit(_read_one(image, f"images[{number}]").to(device), size, resize, interpolation, f"images[{number}]")
        for number, image in enumerate(images)
    ]
    if not fitted:
        raise ConfigError("images: the list is empty; give at least one image")
    _need_one_size(fitted)
    return torch.cat(fitted)


def _fit(
    pixels: UInt8[Tensor, "b h w 3"], size: int | None, resize: bool, interpolation: Interpolation, name: str
) -> UInt8[Tensor, "b h2 w2 3"]:
    height, width = pixels.shape[1:3]
    if min(height, width) == 0:
        raise ConfigError(f"{name}: {list(pixels.shape)} has no pixels; give images of at least 1 × 1")
    if size is None or (height, width) == (size, size):
        return pixels
    if not resize:
        raise ConfigError(
            f"{name}: height {height}, width {width}; this model takes {size} × {size} px and was loaded with "
            "resize=False; resize the images, or load it with resize=True"
        )
    return resized_centre_crop(pixels, size, interpolation)


def _need_one_size(images: Sequence[UInt8[Tensor, "1 h w 3"]]) -> None:
    """Raise ConfigError for images that cannot be one batch, because they keep their sizes and these differ."""
    for number, image in enumerate(images):
        if image.shape != images[0].shape:
            sizes = " and ".join("{} × {}".format(*part.shape[1:3]) for part in (images[0], image))
            raise ConfigError(
                f"images[{number}]: one batch cannot have images of {sizes} (height × width); call once for each size"
            )


def _read_one(image: object, name: str) -> UInt8[Tensor, "1 h w 3"]:
    if isinstance(image, np.ndarray | Tensor) and image.ndim == 4:
        raise ConfigError(
            f"{name}: {list(image.shape)} is a batch in a list; give the batch alone, or a list of single images"
        )
    return _read(image, name)


def _read(images: object, name: str) -> UInt8[Tensor, "b h w 3"]:
    """Return the pixels of one image or batch, at its size and on its device. `name` begins the errors."""
    if isinstance(images, str | os.PathLike):
        return _from_file(Path(images), name)
    if isinstance(images, PIL.Image.Image):
        return _from_pil(images, name)
    if isinstance(images, np.ndarray):
        return _from_tensor(_as_tensor(images, name), name)
    if isinstance(images, Tensor):
        return _from_tensor(images, name)
    raise ConfigError(f"{name}: {_described(images)}; give {KINDS}")


def _described(value: object) -> str:
    if isinstance(value, bytes):
        return "bytes are not an image; open them with PIL.Image.open(io.BytesIO(...))"
    return f"{'None' if value is None else type(value).__name__} is not an image"


def _from_file(path: Path, name: str) -> UInt8[Tensor, "1 h w 3"]:
    try:
        image = PIL.Image.open(path)
    except FileNotFoundError:
        raise ConfigError(f"{name}: {path.absolute()} does not exist; correct the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{name}: {path} is a folder; give its files, as sorted(Path(...).glob('*.jpg'))") from None
    except PIL.UnidentifiedImageError:
        raise ConfigError(f"{name}: {path} is not an image of a format that Pillow reads; give another file") from None
    except DECODE_ERRORS as error:
        raise ConfigError(f"{name}: {path} cannot be read ({one_line(error)}); give another file") from error
    with image:
        return _from_pil(image, f"{name}: {path}")


def _from_pil(image: PIL.Image.Image, name: str) -> UInt8[Tensor, "1 h w 3"]:
    try:
        image.load()
        rgb = to_rgb(upright(image))
    except DECODE_ERRORS as error:
        raise ConfigError(f"{name}: an image of mode {image.mode} cannot become RGB ({one_line(error)})") from error
    return torch.from_numpy(np.array(rgb))[None]


def _as_tensor(array: np.ndarray, name: str) -> Tensor:
    """Return the array as a tensor, copied where torch cannot share its memory."""
    native = array.dtype.newbyteorder("=")
    if native.name not in ("uint8", "uint16", "float16", "float32", "float64"):
        raise _wrong_type(native.name, array.shape, name)
    return torch.from_numpy(np.require(array, native, ["C", "W"]))


def _wrong_type(dtype: str, shape: Sequence[int], name: str) -> ConfigError:
    return ConfigError(
        f"{name}: {dtype} {list(shape)}; give uint8 from 0 to 255, uint16 from 0 to 65535, or float from 0 to 1"
    )


def _from_tensor(images: Real[Tensor, "..."], name: str) -> UInt8[Tensor, "b h w 3"]:
    return _to_rgb(_to_levels(_channels_last(images, name), name))


def _channels_last(images: Real[Tensor, "..."], name: str) -> Real[Tensor, "b h w c"]:
    """Return one image or a batch as a batch with the channels last. The channel axis is the one of 1, 3 or 4."""
    described = f"{name}: {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    if images.ndim == 2:
        return images[None, :, :, None]
    last = images.ndim in (3, 4) and images.shape[-1] in CHANNELS
    first = images.ndim in (3, 4) and images.shape[-3] in CHANNELS
    if last and first:
        raise ConfigError(
            f"{described} may have its channels first or last; give PIL images, as PIL.Image.fromarray(pixels) of "
            "uint8 [h, w, 3]"
        )
    if not last and not first:
        raise ConfigError(
            f"{described} is no image; give [h, w], [h, w, c], [c, h, w], [b, h, w, c] or [b, c, h, w] with c of "
            "1 (grey), 3 (RGB) or 4 (RGBA)"
        )
    images = images if last else images.movedim(-3, -1)
    return images if images.ndim == 4 else images[None]


def _to_levels(images: Real[Tensor, "b h w c"], name: str) -> UInt8[Tensor, "b h w c"]:
    """Return the 256 levels of training. Raises ConfigError for other types, and for values out of range."""
    if images.dtype == torch.uint8:
        return images
    if images.dtype == torch.uint16:
        return to_8_bits(images.int()).to(torch.uint8)
    if images.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise _wrong_type(str(images.dtype).removeprefix("torch."), images.shape, name)
    images = images.float()
    if images.numel() > 0:
        low, high = torch.stack(images.aminmax()).tolist()
        _check_range(low, high, name)
    return (images * 255).round().to(torch.uint8)


def _check_range(low: float, high: float, name: str) -> None:
    """Raise ConfigError unless the lowest and the highest value of a float image are within 0 to 1."""
    if low >= 0 and high <= 1:
        return
    if math.isnan(low):
        reason = "values are NaN; float images have values from 0 to 1"
    elif low >= -0.1 and high <= 1.1:
        reason = f"values from {low:.3g} to {high:.3g} in a float array; clip them to 0 to 1"
    elif low < 0:
        reason = (
            f"values from {low:.3g} to {high:.3g} look normalised; give values from 0 to 1, which the model normalises"
        )
    elif high <= 255:
        reason = f"values up to {high:.4g} in a float array: divide by 255, or use uint8"
    else:
        reason = f"values up to {high:.4g} in a float array; scale them to 0 to 1"
    raise ConfigError(f"{name}: {reason}")


def _to_rgb(pixels: UInt8[Tensor, "b h w c"]) -> UInt8[Tensor, "b h w 3"]:
    """Repeat grey, and put what is transparent on white."""
    if pixels.shape[3] == 1:
        return pixels.expand(-1, -1, -1, 3)
    if pixels.shape[3] == 3:
        return pixels
    colour, alpha = pixels[..., :3].int(), pixels[..., 3:].int()
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)

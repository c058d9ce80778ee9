"""Batched torch replay of the pipelines' maths from recorded parameters.

Evaluation uses it for banks and grids, and the parity tests compare it with DALI. Every function runs on the device of
its images. photometric.py and geometry.py explain the maths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, interpolate, pad

from dali_pipelines.augmentations import (
    FLOAT_TO_UINT8,
    IDENTITY,
    LUMA,
    OPS,
    PHOTOMETRIC_FIELDS,
    SOLARIZE_THRESHOLD,
    JitterImpl,
    PhotometricConfig,
)
from dali_pipelines.crops import Interpolation, resized_side

MODES = {"linear": "bilinear", "cubic": "bicubic"}
"""Names of the interpolations in torch, which are also timm's and Pillow's."""


def sample_photometric(spec: PhotometricConfig, n: int, generator: torch.Generator) -> Float[Tensor, "n p"]:
    """Sample parameters like the DALI graph, on the CPU; columns as PHOTOMETRIC_FIELDS, identity where not applied.

    Ops that the paper lacks use random numbers only where they can be applied: others are the same with and without.
    """
    drawn = torch.tensor(IDENTITY).repeat(n, 1)

    def coin(probability: float) -> Tensor:
        return torch.rand(n, generator=generator) < probability

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    jitter = coin(spec.jitter_probability)
    for column, op in enumerate(OPS):
        if not (op.in_paper or spec.applies(op)):
            continue
        where = jitter if op.kind == "jitter" else coin(spec.probability(op))
        value = torch.ones(n) if op.is_switch else uniform(*spec.value_range(op))
        drawn[:, column] = torch.where(where, value, drawn[:, column])
    return drawn


def apply_photometric(
    images: UInt8[Tensor, "b h w 3"], params: Float[Tensor, "b p"], jitter_impl: JitterImpl
) -> UInt8[Tensor, "b h w 3"]:
    """Apply each row of `params` (PHOTOMETRIC_FIELDS) to its image, in that order. `images` is not changed.

    Autocast is disabled: matrix products in bf16 would change colours by whole grey levels.
    """
    with torch.autocast(images.device.type, enabled=False):
        return _apply_photometric(images, params.to(images.device), jitter_impl)


def _apply_photometric(
    images: UInt8[Tensor, "b h w 3"], params: Float[Tensor, "b p"], jitter_impl: JitterImpl
) -> UInt8[Tensor, "b h w 3"]:
    values = dict(zip(PHOTOMETRIC_FIELDS, params.float()[..., None, None, None].unbind(1), strict=True))
    x = images.float()
    x = _jitter_linear(x, values) if jitter_impl == "linear" else _jitter_torchvision(x, values)
    applied = (params.cpu() != torch.tensor(IDENTITY)).any(0).tolist()
    maths = JITTER_MATHS | DESTRUCTIVE_MATHS
    for op, some in zip(OPS, applied, strict=True):
        if some and op.name in maths:
            x = maths[op.name](x, values[op.field])
    return x.to(torch.uint8)


def _jitter_linear(x: Float[Tensor, "b h w 3"], values: dict[str, Tensor]) -> Float[Tensor, "b h w 3"]:
    centre = _grey(x).mean((1, 2, 3), keepdim=True)
    x = (values["brightness"] * (centre + values["contrast"] * (x - centre))).round().clamp(0, 255)
    thirds = torch.arange(3, device=x.device) / 3
    angles = 2 * torch.pi * (values["hue"].flatten(1) + thirds)
    same, after, before = ((1 + 2 * values["saturation"].flatten(1) * angles.cos()) / 3).unbind(1)
    circulant = torch.stack([same, after, before, before, same, after, after, before, same], dim=1).unflatten(1, (3, 3))
    return torch.einsum("bij,bhwj->bhwi", circulant, x).round().clamp(0, 255)


def _jitter_torchvision(x: Float[Tensor, "b h w 3"], values: dict[str, Tensor]) -> Float[Tensor, "b h w 3"]:
    x = (values["brightness"] * x).clamp(0, 255).floor()
    centre = _grey(x).mean((1, 2, 3), keepdim=True)
    x = torch.where(values["contrast"] == 1, x, (centre + values["contrast"] * (x - centre)).clamp(0, 255).floor())
    saturation = values["saturation"]
    x = torch.where(saturation == 1, x, (saturation * x + (1 - saturation) * _grey(x)).clamp(0, 255).floor())
    return torch.where(values["hue"] == 0, x, _rotate_hue(x, values["hue"][..., 0]))


def _rotate_hue(x: Float[Tensor, "b h w 3"], turns: Float[Tensor, "b 1 1"]) -> Float[Tensor, "b h w 3"]:
    red, green, blue = x.unbind(-1)
    value, lowest = x.amax(-1), x.amin(-1)
    chroma = value - lowest
    within = torch.where(red == value, green - blue, torch.where(green == value, blue - red, red - green))
    sector = torch.where(red == value, 0.0, torch.where(green == value, 2.0, 4.0))
    hue = (within / chroma.clamp(min=1) + sector + 6 * turns) % 6
    shares = torch.stack([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()], dim=-1)
    turned = lowest[..., None] + chroma[..., None] * shares.clamp(0, 1)
    return (turned * FLOAT_TO_UINT8).clamp(0, 255).floor()


def _grey(x: Float[Tensor, "b h w 3"]) -> Float[Tensor, "b h w 1"]:
    return (x @ torch.tensor(LUMA, device=x.device)).round()[..., None]


def _gamma(x: Float[Tensor, "b h w 3"], gamma: Float[Tensor, "b 1 1 1"]) -> Float[Tensor, "b h w 3"]:
    return torch.where(gamma == 1, x, (255 * (x / 255) ** gamma + 0.5).floor())


def _temperature(x: Float[Tensor, "b h w 3"], stops: Float[Tensor, "b 1 1 1"]) -> Float[Tensor, "b h w 3"]:
    return (x * 2 ** (stops * torch.tensor([1.0, 0.0, -1.0], device=x.device))).round().clamp(max=255)


def _rotate_where(x: Float[Tensor, "b h w 3"], turns: Float[Tensor, "b 1 1 1"]) -> Float[Tensor, "b h w 3"]:
    rotated = turns.flatten().nonzero().flatten()
    x[rotated] = _rotate(x[rotated], turns.flatten()[rotated])
    return x


def _rotate(x: Float[Tensor, "b h w 3"], turns: Float[Tensor, " b"]) -> Float[Tensor, "b h w 3"]:
    """Rotate counter-clockwise about the centre; outside the image its mirror image continues."""
    b, h, w, _ = x.shape
    cos, sin = (2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()
    zero = torch.zeros_like(cos)
    rows = torch.stack([cos, -sin * h / w, zero, sin * w / h, cos, zero], dim=1)
    grid = affine_grid(rows.view(b, 2, 3), [b, 3, h, w], align_corners=False)
    planes = grid_sample(x.permute(0, 3, 1, 2), grid, padding_mode="reflection", align_corners=False)
    return planes.permute(0, 2, 3, 1).round()


JITTER_MATHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gamma": _gamma,
    "temperature": _temperature,
    "rotation": _rotate_where,
}
"""Maths of each jitter op after the paper's four: from images [b, h, w, 3] in grey levels and parameters [b, 1, 1, 1],
the identity where it is not done, to images. Ops that no image of a batch has are not called."""


def _grayscale(x: Float[Tensor, "b h w 3"], done: Float[Tensor, "b 1 1 1"]) -> Float[Tensor, "b h w 3"]:
    return torch.where(done > 0, _grey(x), x)


def _solarize(x: Float[Tensor, "b h w 3"], done: Float[Tensor, "b 1 1 1"]) -> Float[Tensor, "b h w 3"]:
    return torch.where((done > 0) & (x >= SOLARIZE_THRESHOLD), 255 - x, x)


def _blur_where(x: Float[Tensor, "b h w 3"], sigma: Float[Tensor, "b 1 1 1"]) -> Float[Tensor, "b h w 3"]:
    blurred = sigma.flatten().nonzero().flatten()
    x[blurred] = _blur(x[blurred], sigma.flatten()[blurred])
    return x


def _blur(x: Float[Tensor, "b h w 3"], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b h w 3"]:
    """Blur along rows, then along columns, with rounding after each and mirrored borders.

    The number of taps follows the largest sigma of the batch; in the DALI graph, it follows the largest possible sigma.
    The weights beyond three sigmas are 0.3% of a kernel.
    """
    b, h, w, _ = x.shape
    reach = int((3 * sigma).ceil().max())
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    taps = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, dim=0)
    planes = x.permute(0, 3, 1, 2).reshape(1, b * 3, h, w)
    planes = conv2d(pad(planes, (reach, reach, 0, 0), mode="reflect"), taps[:, None, None, :], groups=b * 3).round()
    planes = conv2d(pad(planes, (0, 0, reach, reach), mode="reflect"), taps[:, None, :, None], groups=b * 3).round()
    return planes.reshape(b, 3, h, w).permute(0, 2, 3, 1)


DESTRUCTIVE_MATHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grayscale": _grayscale,
    "blur": _blur_where,
    "solarize": _solarize,
}
"""Maths of each destructive op: from images [b, h, w, 3] in grey levels and parameters [b, 1, 1, 1], 0 where it is not
done, to images."""


def apply_crop(
    images: list[UInt8[Tensor, "_ _ 3"]], geometry: Float[Tensor, "b g"], size: int
) -> UInt8[Tensor, "b h w 3"]:
    """Crop each image's box (GEOMETRY_FIELDS), resize it to size×size with antialiasing, and flip where recorded."""
    views = []
    for image, row in zip(images, geometry.tolist(), strict=True):
        left, top, width, height, _, _, flip = (round(value) for value in row)
        box = image[top : top + height, left : left + width].permute(2, 0, 1)[None]
        view = _resize(box, (size, size))
        views.append((view.flip(3) if flip else view)[0].permute(1, 2, 0))
    return torch.stack(views)


def resized_centre_crop(
    images: UInt8[Tensor, "b h w 3"], size: int, interpolation: Interpolation = "linear"
) -> UInt8[Tensor, "b s s 3"]:
    """Resize the shorter side to `resized_side(size)`, with antialiasing, and crop the centre, as `centre_crops`."""
    height, width = (side * resized_side(size) // min(images.shape[1:3]) for side in images.shape[1:3])
    top, left = ((surplus + surplus // 2 % 2) // 2 for surplus in (height - size, width - size))
    resized = _resize(images.permute(0, 3, 1, 2), (height, width), interpolation)
    return resized[:, :, top : top + size, left : left + size].permute(0, 2, 3, 1)


def _resize(
    images: UInt8[Tensor, "b 3 h w"], sides: tuple[int, int], interpolation: Interpolation = "linear"
) -> UInt8[Tensor, "b 3 h2 w2"]:
    """Resize with antialiasing where it reduces."""
    resized = interpolate(images.float(), sides, mode=MODES[interpolation], antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)

"""Which patches the source keeps and which are predicted: I-JEPA's block sampler, vectorised (paper, A.1).

A mask is a pure function of (seed, step, index of the sample in the global batch): no hidden state, so nothing needs to
be saved, any sample's mask can be made again, and a batch has the same masks however many processes share it. Numbers
come from integer hashing, which is the same on every device.

Unlike I-JEPA's code, each sample draws its own block sizes (I-JEPA draws one per batch), blocks reach the last row and
column as well, and no visible patch is thrown away to make a batch rectangular.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from iwm.config import Masking
from iwm.packing import Packing, Room, pack, room, to_device


class Masks(NamedTuple):
    """`visible`: patches that the context encoder sees. `queried`: patches that are predicted, one row per separate
    prediction: 1 row of all masked patches (`iwm`), or one row per target block (`ijepa`). Patches are in row-major
    order.
    """

    visible: Bool[Tensor, "b n"]
    queried: Bool[Tensor, "b m n"]


def sample_masks(masking: Masking, grid: int, seed: int, step: int, index: Int64[Tensor, "b"]) -> Masks:
    """Masks for the samples at `index` of the global batch of `step`, on index's device, grid×grid patches each.

    Every sample keeps at least one visible patch.
    """
    k = masking.blocks
    draws = uniform(seed, step, index, 4 * k + 3)
    blocks = _blocks(draws[:, : 4 * k].unflatten(1, (k, 4)), grid, masking.area, masking.aspect)
    union = blocks.any(dim=1)
    if masking.kind == "iwm":
        # On a tiny grid the blocks can cover everything; then the last one is left out.
        union = torch.where(union.all(dim=1, keepdim=True), blocks[:, :-1].any(dim=1), union)
        return Masks(visible=~union, queried=union[:, None])
    size_and_place = torch.stack((draws[:, -3], torch.zeros_like(draws[:, -3]), draws[:, -2], draws[:, -1]), dim=-1)
    context = _blocks(size_and_place[:, None], grid, masking.context_area, (1.0, 1.0))[:, 0]
    visible = context & ~union
    # The same for I-JEPA's context: without a patch left, it is everything but the target blocks, or but the first.
    visible = torch.where(visible.any(dim=1, keepdim=True), visible, ~union)
    visible = torch.where(visible.any(dim=1, keepdim=True), visible, ~blocks[:, 0])
    return Masks(visible=visible, queried=blocks)


def _blocks(
    draws: Float64[Tensor, "b k 4"], grid: int, area: tuple[float, float], aspect: tuple[float, float]
) -> Bool[Tensor, "b k n"]:
    """Rectangles from four uniform numbers each: area (share of the grid), aspect (height / width), top, left."""
    cells = (area[0] + draws[..., 0] * (area[1] - area[0])) * grid * grid
    ratio = aspect[0] + draws[..., 1] * (aspect[1] - aspect[0])
    height = (cells * ratio).sqrt().round().clamp(1, grid)
    width = (cells / ratio).sqrt().round().clamp(1, grid)
    top = (draws[..., 2] * (grid - height + 1)).floor()
    left = (draws[..., 3] * (grid - width + 1)).floor()
    place = torch.arange(grid, device=draws.device)
    rows = (place >= top[..., None]) & (place < (top + height)[..., None])
    columns = (place >= left[..., None]) & (place < (left + width)[..., None])
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)


class PackedMasks(NamedTuple):
    """Masks as a training step takes them, on its device."""

    visible: Bool[Tensor, "b n"]
    queried: Bool[Tensor, "b m n"]
    context: Packing
    """Of the visible patches of each image, in grids of n: what the context encoder sees."""
    rows: Packing | None
    """Of what the predictor sees in each of the b · m predictions, in grids of n places and the extra tokens behind
    them; None where that is all of them, as it is for `iwm`."""

    def to(self, device: torch.device) -> PackedMasks:
        """On the device; the host does not wait for the copies."""
        return self.apply(partial(to_device, device=device))

    def apply(self, function: Callable[[Tensor], Tensor]) -> PackedMasks:
        """These masks with `function` of each tensor in its place."""
        rows = None if self.rows is None else Packing(*map(function, self.rows))
        return PackedMasks(function(self.visible), function(self.queried), Packing(*map(function, self.context)), rows)

    def tensors(self) -> list[Tensor]:
        """All of its tensors, in order."""
        return [self.visible, self.queried, *self.context, *(self.rows or ())]


def pack_masks(masks: Masks, rooms: Rooms | None, extra: int) -> PackedMasks:
    """Pack masks that were drawn on the host. rooms: static shapes for a compiled step; extra: tokens of the predictor
    that stand for no patch (sequence conditioning)."""
    context = pack(masks.visible, rooms.context if rooms else None)
    seen = (masks.visible[:, None] | masks.queried).flatten(0, 1)
    if seen.all():
        return PackedMasks(masks.visible, masks.queried, context, None)
    rows = pack(F.pad(seen, (0, extra), value=True), rooms.rows if rooms else None)
    return PackedMasks(masks.visible, masks.queried, context, rows)


class Rooms(NamedTuple):
    """Static shapes of PackedMasks."""

    context: Room
    rows: Room


@lru_cache
def rooms(masking: Masking, grid: int, extra: int, images: int) -> Rooms:
    """Buffers for batches of `images`, after the statistics of these masks."""
    tokens = token_statistics(masking, grid)
    context = room(tokens.visible, tokens.visible_deviation, images, grid * grid)
    predicted = tokens.predicted + masking.blocks * extra
    return Rooms(context, room(predicted, tokens.predicted_deviation, images, grid * grid + extra))


class TokenStatistics(NamedTuple):
    """Mean and standard deviation over images of the patches that the context encoder sees, and of those that the
    predictor sees in all predictions of an image together."""

    visible: float
    visible_deviation: float
    predicted: float
    predicted_deviation: float


@lru_cache
def token_statistics(masking: Masking, grid: int, images: int = 4096) -> TokenStatistics:
    """Measured on masks of seed 0."""
    masks = sample_masks(masking, grid, seed=0, step=0, index=torch.arange(images))
    visible = masks.visible.sum(1).double()
    predicted = (masks.visible[:, None] | masks.queried).sum((1, 2)).double()
    return TokenStatistics(visible.mean().item(), visible.std().item(), predicted.mean().item(), predicted.std().item())


def uniform(seed: int, step: int, index: Int64[Tensor, "b"], draws: int) -> Float64[Tensor, "b {draws}"]:
    """Numbers in [0, 1) that depend on (seed, step, index, position) alone, the same on every device.

    SplitMix64 in counter mode (Steele, Lea and Flood, 2014), in wrapping int64 arithmetic.
    """
    state = _mix(_mix(torch.full_like(index, seed)) + step)
    state = _mix(_mix(state + index)[:, None] + torch.arange(draws, device=index.device))
    return _shift(state, 11).to(torch.float64) * 2.0**-53


def _mix(state: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    state = state - 0x61C8864680B583EB  # the golden-ratio increment 0x9E3779B97F4A7C15, as a signed number
    state = (state ^ _shift(state, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift(state, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return state ^ _shift(state, 31)


def _shift(state: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """Logical right shift: torch's own carries the sign along."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)

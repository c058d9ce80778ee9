"""Block masks of visible and predicted patches, vectorised (paper, A.1).

A mask is a pure function of (seed, step, index of the sample in the global batch). There is no hidden state: nothing
needs to be saved, any mask can be regenerated, and a batch has the same masks for any number of processes. Random
numbers come from integer hashing, which gives the same results on every device.

Differences from I-JEPA's code (masking.sampler `paper`): each sample draws its own block sizes, blocks can reach the
last row and column, and no visible patch is discarded to make a batch rectangular. iwm/official_masks.py has I-JEPA's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from iwm.block_sizes import Sides, size_shares
from iwm.hashing import hashed_uniform
from iwm.loss_tokens import LossTokens, loss_mask, pack_loss_tokens
from iwm.model_config import LossConfig, MaskingConfig
from iwm.official_masks import Drawn, draw_and_cut, official_blocks, official_context, sizes_of_step
from iwm.packing import (
    CAPACITY_SIGMAS,
    CUT_SIGMAS,
    BufferSize,
    Packing,
    buffer_size,
    copy_to_device_together,
    pack_tokens,
)

Sizes = tuple[Sides, Sides] | None
"""Sides of all target blocks and of all context blocks; None: each block has its own."""


class Masks(NamedTuple):
    """Masks of a batch, over patches in row-major order."""

    visible: Bool[Tensor, "b n"]
    """True where the context encoder sees the patch."""
    predicted: Bool[Tensor, "b m n"]
    """True where the patch is predicted, one row per prediction: one row of all masked patches (`iwm`), or one row per
    target block (`ijepa`)."""


def sample_masks(masking: MaskingConfig, grid: int, seed: int, step: int, index: Int64[Tensor, "b"]) -> Masks:
    """Sample masks of grid×grid patches for the samples `index` of the global batch of `step`, on index's device.

    At least one patch stays visible, unless all blocks but the last cover the grid (`iwm`, large block_scale).
    """
    sizes = sizes_of_step(masking, grid, seed, step) if masking.sampler == "official" else None
    return _sample_sized(masking, grid, sizes, seed, step, index)


def _sample_sized(
    masking: MaskingConfig,
    grid: int,
    sizes: Sizes,
    seed: int,
    step: int,
    index: Int64[Tensor, "b"],
) -> Masks:
    """Sample masks whose blocks have these sizes."""
    k = masking.num_blocks
    if masking.type == "iwm":
        if sizes is None:
            blocks = _target_blocks(masking, grid, hashed_uniform(seed, step, index, 4 * k))
        else:
            blocks = official_blocks(masking, grid, sizes[0], seed, step, index)
        union = blocks.any(dim=1)
        # On a tiny grid the blocks can cover all patches; the last block is then left out.
        union = torch.where(union.all(dim=1, keepdim=True), blocks[:, :-1].any(dim=1), union)
        return Masks(visible=~union, predicted=union[:, None])

    def draw(members: Int64[Tensor, "g"]) -> Drawn:
        if sizes is None:
            draws = hashed_uniform(seed, step, members, 4 * k + 3)
            blocks = _target_blocks(masking, grid, draws)
            return blocks, _context(masking, grid, draws, blocks)
        blocks = official_blocks(masking, grid, sizes[0], seed, step, members)
        return blocks, official_context(masking, grid, sizes[1], seed, step, members, blocks)

    blocks, visible = draw_and_cut(index, masking.cut_group, draw) if masking.cut else draw(index)
    return Masks(visible=visible, predicted=blocks)


def _target_blocks(masking: MaskingConfig, grid: int, draws: Float64[Tensor, "b d"]) -> Bool[Tensor, "b k n"]:
    """Return target blocks, each with a size of its own."""
    k = masking.num_blocks
    return _blocks(draws[:, : 4 * k].unflatten(1, (k, 4)), grid, masking.block_scale, masking.block_aspect_ratio)


def _context(
    masking: MaskingConfig, grid: int, draws: Float64[Tensor, "b d"], blocks: Bool[Tensor, "b k n"]
) -> Bool[Tensor, "b n"]:
    """Return what is visible: a context block, from the last three draws, without the target blocks."""
    union = blocks.any(dim=1)
    size_and_place = torch.stack((draws[:, -3], torch.zeros_like(draws[:, -3]), draws[:, -2], draws[:, -1]), dim=-1)
    context = _blocks(size_and_place[:, None], grid, masking.context_scale, (1.0, 1.0))[:, 0]
    visible = context & ~union
    # If no context patch is left, the context is all patches outside the target blocks, or outside the first one.
    visible = torch.where(visible.any(dim=1, keepdim=True), visible, ~union)
    return torch.where(visible.any(dim=1, keepdim=True), visible, ~blocks[:, 0])


def _blocks(
    draws: Float64[Tensor, "b k 4"], grid: int, area: tuple[float, float], aspect: tuple[float, float]
) -> Bool[Tensor, "b k n"]:
    """Return the masks of rectangles, each from four uniform numbers: area, aspect ratio, top, left.

    area: range of the share of the grid; aspect: range of height / width.
    """
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
    """Masks with their packings, as a training step takes them."""

    visible: Bool[Tensor, "b n"]
    predicted: Bool[Tensor, "b m n"]
    context: Packing
    """Packing of each image's visible patches (the context encoder's input), in grids of n."""
    predictor: Packing | None
    """Packing of the predictor's b · m input sequences, each n patches and then the action tokens; None where every
    sequence is complete, so that nothing is packed (`iwm`)."""
    loss: LossTokens
    """Tokens that the loss compares."""

    def to(self, device: torch.device) -> PackedMasks:
        """Copy to the device without making the host wait."""
        copies = iter(copy_to_device_together(self.tensors(), device))
        return self.apply(lambda _: next(copies))

    def apply(self, function: Callable[[Tensor], Tensor]) -> PackedMasks:
        """Apply `function` to each tensor, in the order of `tensors`, and return the new masks."""
        return PackedMasks(
            function(self.visible),
            function(self.predicted),
            Packing(*map(function, self.context)),
            None if self.predictor is None else Packing(*map(function, self.predictor)),
            self.loss.apply(function),
        )

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in order."""
        return [self.visible, self.predicted, *self.context, *(self.predictor or ()), *self.loss]


def pack_masks(masks: Masks, sizes: MaskBufferSizes | None, extra: int, loss: LossConfig) -> PackedMasks:
    """Pack masks that were drawn on the host.

    sizes: static shapes for a compiled step; None: exact sizes. extra: number of the predictor's tokens that are not
    patches (sequence conditioning).
    """
    context = pack_tokens(masks.visible, sizes.context if sizes else None)
    counted = loss_mask(masks.visible, masks.predicted, loss)
    in_predictor = F.pad(counted, (0, extra)).flatten()
    seen = (masks.visible[:, None] | masks.predicted).flatten(0, 1)
    predictor = None
    if not seen.all():
        predictor = pack_tokens(F.pad(seen, (0, extra), value=True), sizes.predictor if sizes else None)
        in_predictor = F.pad(in_predictor, (0, 1))[predictor.token_index]  # padding is one beyond the last
    compared = pack_loss_tokens(counted, in_predictor, loss, sizes.loss if sizes else None)
    return PackedMasks(masks.visible, masks.predicted, context, predictor, compared)


class MaskBufferSizes(NamedTuple):
    """Static buffer sizes of PackedMasks."""

    context: BufferSize
    predictor: BufferSize
    loss: BufferSize


@lru_cache
def mask_buffer_sizes(
    masking: MaskingConfig, grid: int, extra: int, images: int, predict: Literal["masked", "all"]
) -> MaskBufferSizes:
    """Return the buffer sizes for batches of `images`, from the token statistics of these masks.

    predict: loss.predict.
    """
    kinds = _statistics_by_size(masking, grid)
    # After the cut the images of a group have the same numbers of tokens, so that their deviations add up.
    group = min(images, masking.cut_group) if masking.cut else 1
    many, few = CUT_SIGMAS if masking.cut else (CAPACITY_SIGMAS, CAPACITY_SIGMAS)

    def size(mean: str, extra_tokens: int, longest: int, above: float = many) -> BufferSize:
        means = [getattr(kind, mean) + extra_tokens for _, kind in kinds]
        deviation = max(getattr(kind, f"{mean}_deviation") for _, kind in kinds)
        return buffer_size(max(means), deviation * group**0.5, images, longest, max(means) - min(means), (above, few))

    every = buffer_size(float(grid * grid), 0.0, images, grid * grid)
    return MaskBufferSizes(
        size("visible", 0, grid * grid),
        size("seen", masking.num_blocks * extra, grid * grid + extra),
        size("predicted", 0, grid * grid, few) if predict == "masked" else every,
    )


class TokenStatistics(NamedTuple):
    """Mean and standard deviation over images of the number of patches, summed over an image's predictions.

    visible: input of the context encoder. seen: input of the predictor. predicted: the predictor's mask tokens.
    """

    visible: float
    visible_deviation: float
    seen: float
    seen_deviation: float
    predicted: float
    predicted_deviation: float


@lru_cache
def token_statistics(masking: MaskingConfig, grid: int) -> TokenStatistics:
    """Measure the token statistics on masks of seed 0."""
    kinds = _statistics_by_size(masking, grid)
    if len(kinds) == 1:
        return kinds[0][1]
    values: list[float] = []
    for name in ("visible", "seen", "predicted"):
        parts = [(share, getattr(kind, name), getattr(kind, f"{name}_deviation")) for share, kind in kinds]
        mean = sum(share * value for share, value, _ in parts)
        variance = sum(share * (deviation**2 + (value - mean) ** 2) for share, value, deviation in parts)
        values += [mean, variance**0.5]
    return TokenStatistics(*values)


@lru_cache
def _statistics_by_size(masking: MaskingConfig, grid: int) -> list[tuple[float, TokenStatistics]]:
    """Return the statistics of the batches of each size of blocks, with their share of the batches.

    Without masking.sampler `official` blocks have their own sizes, and there is one kind of batch.
    """
    if masking.sampler != "official":
        return [(1.0, _measure(masking, grid, None))]
    return [(share, _measure(masking, grid, sizes)) for sizes, share in size_shares(masking, grid).items()]


def _measure(masking: MaskingConfig, grid: int, sizes: Sizes) -> TokenStatistics:
    # After the cut the images of a group have the same numbers, so that groups are the samples.
    images = 64 * masking.cut_group if masking.cut else 4096
    masks = _sample_sized(masking, grid, sizes, 0, 0, torch.arange(images))
    statistics: list[float] = []
    for tokens in (masks.visible, masks.visible[:, None] | masks.predicted, masks.predicted):
        counts = tokens.flatten(1).sum(1).double()
        statistics += [counts.mean().item(), counts.std().item()]
    return TokenStatistics(*statistics)

"""Block masks of visible and predicted patches, vectorised (paper, A.1).

A mask is a pure function of (seed, step, index of the sample in the global batch). There is no hidden state: nothing
needs to be saved, any mask can be regenerated, and a batch has the same masks for any number of processes. Random
numbers come from integer hashing, which gives the same results on every device.

Differences from I-JEPA's code: each sample draws its own block sizes (I-JEPA draws one per batch), blocks can reach the
last row and column, and no visible patch is discarded to make a batch rectangular.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from iwm.loss_tokens import LossTokens, loss_mask, pack_loss_tokens
from iwm.model_config import LossConfig, MaskingConfig
from iwm.packing import BufferSize, Packing, buffer_size, copy_to_device_together, pack_tokens


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
    k = masking.num_blocks
    draws = hashed_uniform(seed, step, index, 4 * k + 3)
    blocks = _blocks(draws[:, : 4 * k].unflatten(1, (k, 4)), grid, masking.block_scale, masking.block_aspect_ratio)
    union = blocks.any(dim=1)
    if masking.type == "iwm":
        # On a tiny grid the blocks can cover all patches; the last block is then left out.
        union = torch.where(union.all(dim=1, keepdim=True), blocks[:, :-1].any(dim=1), union)
        return Masks(visible=~union, predicted=union[:, None])
    size_and_place = torch.stack((draws[:, -3], torch.zeros_like(draws[:, -3]), draws[:, -2], draws[:, -1]), dim=-1)
    context = _blocks(size_and_place[:, None], grid, masking.context_scale, (1.0, 1.0))[:, 0]
    visible = context & ~union
    # Likewise for I-JEPA: if no context patch is left, the context is all patches outside the target blocks, or outside
    # the first one.
    visible = torch.where(visible.any(dim=1, keepdim=True), visible, ~union)
    visible = torch.where(visible.any(dim=1, keepdim=True), visible, ~blocks[:, 0])
    return Masks(visible=visible, predicted=blocks)


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
    tokens = token_statistics(masking, grid)
    context = buffer_size(tokens.visible, tokens.visible_deviation, images, grid * grid)
    seen = tokens.seen + masking.num_blocks * extra
    predictor = buffer_size(seen, tokens.seen_deviation, images, grid * grid + extra)
    counted, deviation = (
        (tokens.predicted, tokens.predicted_deviation) if predict == "masked" else (float(grid * grid), 0.0)
    )
    return MaskBufferSizes(context, predictor, buffer_size(counted, deviation, images, grid * grid))


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
def token_statistics(masking: MaskingConfig, grid: int, images: int = 4096) -> TokenStatistics:
    """Measure the token statistics on masks of seed 0."""
    masks = sample_masks(masking, grid, seed=0, step=0, index=torch.arange(images))
    statistics: list[float] = []
    for tokens in (masks.visible, masks.visible[:, None] | masks.predicted, masks.predicted):
        counts = tokens.flatten(1).sum(1).double()
        statistics += [counts.mean().item(), counts.std().item()]
    return TokenStatistics(*statistics)


def hashed_uniform(seed: int, step: int, index: Int64[Tensor, "b"], draws: int) -> Float64[Tensor, "b {draws}"]:
    """Return numbers in [0, 1) that depend on (seed, step, index, position) alone, the same on every device.

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
    """Shift right logically; torch's own shift is arithmetic (it extends the sign)."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)

"""Sequence packing: the visible tokens of all images in one buffer, almost without padding.

The number of visible patches differs from image to image (103 to 109 of 196 on average, standard deviation 14). Padding
rows to a common width would process twice the patches; cutting them to the shortest row would discard a third of them.
Packed rows are concatenated, and attention is restricted to each row (iwm/models/attention.py).

Packings are computed on the host, where masks are drawn, so the host knows the number of tokens without synchronising
with the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32, Int64, UInt8
from torch import Tensor

CAPACITY_SIGMAS = 4.0
"""Buffer size above the mean, in standard deviations of a batch's number of tokens. About one batch in 30,000 needs
more; pack_tokens then enlarges the buffer."""

CUT_SIGMAS = (3.0, 8.0)
"""The same above and below the mean for the least of many images (masking.cut), whose distribution is as skewed as
Gumbel's: far above the mean is rare, far below is not. That of the smallest block has few values and no such skew."""

TOKEN_MULTIPLE = 16
"""Factor of every static number of tokens: the alignment for tensor cores, 8 in bf16 and 16 in float8."""


class Packing(NamedTuple):
    """Packing of the True entries of a mask [sequences, positions], in row-major order, into a buffer of t tokens.

    Tokens beyond the grid's own are padding: they form separate sequences, are computed, and affect no result.
    """

    token_index: Int64[Tensor, "t"]
    """Position of each token in the flattened grid; padding has rows · places, one beyond the last."""
    cu_seqlens: Int32[Tensor, "s1"]
    """Start of each sequence and end of the last: the rows of the grid, then the padding sequences."""
    padded_index: Int64[Tensor, "t"]
    """Position of each token in the flattened `token_mask`."""
    token_mask: Bool[Tensor, "s w"]
    """True for tokens, False for padding, in sequences padded to one width; for attention without cu_seqlens."""

    def to(self, device: torch.device) -> Packing:
        """Copy to the device without making the host wait."""
        return Packing(*copy_to_device_together(self, device))


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device from pinned memory, without making the host wait."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def copy_to_device_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to the device in one piece, without making the host wait. They share memory there.

    Each copy waits for its turn among those of the pipeline: nine one after another took 0.4 ms of a training step.
    """
    if device.type == "cpu":
        return list(tensors)
    return split_bytes(copy_to_device(joined_bytes(tensors), device), tensors)


ALIGNMENT = 16
"""Factor of the position of each tensor in `joined_bytes`: the widest load of a kernel (bytes)."""


def joined_bytes(tensors: Sequence[Tensor]) -> UInt8[Tensor, " n"]:
    """Return the bytes of all tensors in one buffer."""
    *begins, end = _positions(tensors)
    buffer = torch.empty(end, dtype=torch.uint8)
    for tensor, begin in zip(tensors, begins, strict=True):
        buffer[begin : begin + tensor.nbytes].view(tensor.dtype).copy_(tensor.flatten())
    return buffer


def split_bytes(buffer: UInt8[Tensor, " n"], like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the buffer that `joined_bytes` made of tensors with these shapes and dtypes."""
    return [
        buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, begin in zip(like, _positions(like)[:-1], strict=True)
    ]


def _positions(tensors: Sequence[Tensor]) -> list[int]:
    """Return the first byte of each tensor in the buffer, and the buffer's length."""
    return [0, *accumulate(ALIGNMENT * math.ceil(tensor.nbytes / ALIGNMENT) for tensor in tensors)]


class BufferSize(NamedTuple):
    """Static shape of a buffer."""

    tokens: int
    num_padding_sequences: int
    """Number of sequences that the padding is split into, so that none is longer than a row."""
    growth: int
    """Step in which the buffer is enlarged for a batch that does not fit (tokens)."""

    def enlarged(self, total: int) -> int:
        """Return the size for a batch of `total` tokens: `tokens`, or more in whole steps where they do not fit."""
        return self.tokens + max(0, math.ceil((total - self.tokens) / self.growth)) * self.growth


def buffer_size(
    mean: float,
    deviation: float,
    images: int,
    longest: int,
    spread: float = 0.0,
    sigmas: tuple[float, float] = (CAPACITY_SIGMAS, CAPACITY_SIGMAS),
) -> BufferSize:
    """Return the buffer size for a batch of images in rows of at most `longest` tokens.

    mean, deviation: mean and standard deviation of the number of tokens per image. spread: difference of this mean from
    that of batches with the fewest tokens. sigmas: standard deviations of a batch's number of tokens above and below
    the mean that the buffer has room for.
    """
    unit = deviation * images**0.5
    tokens = _round_up(images * mean + sigmas[0] * unit)
    filling = min(float(tokens), images * spread + sum(sigmas) * unit)
    return BufferSize(tokens, max(1, math.ceil(filling / longest)), max(TOKEN_MULTIPLE, _round_up(unit)))


def _round_up(tokens: float) -> int:
    return TOKEN_MULTIPLE * math.ceil(tokens / TOKEN_MULTIPLE)


def pack_tokens(present: Bool[Tensor, "r n"], fixed: BufferSize | None) -> Packing:
    """Pack the tokens of a grid row by row, on the host.

    fixed: a static shape. It is enlarged for the rare batch that does not fit, for which the step is compiled once
    more; no token is ever left out. None: exactly the present tokens, with the longest row as the width.
    """
    rows, places = present.shape
    counts = present.sum(dim=1)
    total = int(counts.sum())
    tokens, num_padding, width = total, 0, int(counts.max())
    if fixed is not None:
        tokens, width = fixed.enlarged(total), places
        num_padding = max(fixed.num_padding_sequences, math.ceil((tokens - total) / places))
    place = torch.full((tokens,), rows * places)
    place[:total] = present.flatten().nonzero()[:, 0]
    ends = counts.cumsum(0)
    padding_ends = total + torch.arange(1, num_padding + 1) * (tokens - total) // max(1, num_padding)
    offsets = torch.cat((ends.new_zeros(1), ends, padding_ends))
    lengths = offsets.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths, output_size=tokens)
    slot = sequence * width + torch.arange(tokens) - offsets[sequence]
    return Packing(place, offsets.int(), slot, torch.arange(width) < lengths[:, None])


class _GatherUnique(torch.autograd.Function):
    """Gather of distinct rows, whose gradient is a copy rather than the sum that indexing would compute."""

    @staticmethod
    def forward(x: Float[Tensor, "r d"], place: Int64[Tensor, "t"]) -> Float[Tensor, "t d"]:
        return x.index_select(0, place)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, place = inputs
        ctx.rows = len(x)
        ctx.save_for_backward(place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (place,) = gradients, ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, gradient.shape[1]).index_copy(0, place, gradient), None


def gather_unique(x: Float[Tensor, "r d"], place: Int64[Tensor, "t"]) -> Float[Tensor, "t d"]:
    """Gather the rows of x at distinct places."""
    taken: Tensor = _GatherUnique.apply(x, place)
    return taken


def scatter_tokens(
    x: Float[Tensor, "t d"], place: Int64[Tensor, "t"], onto: Float[Tensor, "r d"]
) -> Float[Tensor, "r d"]:
    """Scatter a packing's tokens into `onto` (out of place); padding goes to an extra row, which is dropped."""
    return _pad_one_row(onto).index_copy(0, place, x)[:-1]


def gather_tokens(x: Float[Tensor, "r d"], place: Int64[Tensor, "t"]) -> Float[Tensor, "t d"]:
    """Gather the rows of x that a packing has tokens for; padding is zero."""
    return gather_unique(_pad_one_row(x), place)


def _pad_one_row(x: Float[Tensor, "r d"]) -> Float[Tensor, "r1 d"]:
    return torch.cat((x, x.new_zeros(1, x.shape[1])))

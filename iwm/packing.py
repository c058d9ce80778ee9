"""Rows of different lengths in one buffer of fixed size: what makes every token that is processed a token needed.

Which patches are visible differs from image to image (103 to 109 of 196 on average, standard deviation 14). Padding
rows to a common width would process twice the patches; cutting them to the shortest throws a third of them away.
Packed, they lie one after another, and attention keeps to each row (iwm/models/attention.py).

Packings are made on the host, where masks are drawn: so the host knows the number of tokens without asking the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

MARGIN = 4.0
"""Standard deviations of the batch's number of tokens that a buffer has room for above the mean: about one batch in
30,000 needs more, and gets it (pack)."""


class Packing(NamedTuple):
    """Where the tokens of a grid of `rows` × `places` lie in a buffer. Tokens beyond the grid's own are filling: they
    make sequences of their own, are computed, and reach nothing.
    """

    place: Int64[Tensor, "t"]
    """Of each token, its place in the flattened grid; rows · places, one beyond the last, for filling."""
    offsets: Int32[Tensor, "s1"]
    """Where each sequence begins, and where the last one ends: rows of the grid, then of filling."""
    slot: Int64[Tensor, "t"]
    """Of each token, its place in the flattened `present`."""
    present: Bool[Tensor, "s w"]
    """Sequences padded to one width: which entries are tokens. What attention without variable lengths needs."""

    def to(self, device: torch.device) -> Packing:
        """On the device; the host does not wait for the copy."""
        return Packing(*(to_device(part, device) for part in self))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy from the host that it does not wait for, from pinned memory."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Room(NamedTuple):
    """The static shape of a buffer."""

    tokens: int
    fillings: int
    """Sequences that filling is divided into, so that none is longer than a row."""
    unit: int
    """What both grow by where a batch does not fit."""


def room(mean: float, deviation: float, images: int, longest: int) -> Room:
    """The buffer for a batch of images whose tokens have this mean and standard deviation each, in rows of at most
    `longest`."""
    unit = deviation * images**0.5
    tokens = _round_up(images * mean + MARGIN * unit)
    return Room(tokens, max(1, math.ceil(2 * MARGIN * unit / longest)), _round_up(unit))


def _round_up(tokens: float) -> int:
    """To a multiple of 8, which tensor cores like."""
    return 8 * math.ceil(tokens / 8)


def pack(present: Bool[Tensor, "r n"], fixed: Room | None) -> Packing:
    """Pack the tokens of a grid, row after row; on the host.

    fixed: a static shape, enlarged for the rare batch that does not fit it (for which the step is compiled once more):
    no token is ever left out. None: exactly as many tokens as there are, the longest row as the width.
    """
    rows, places = present.shape
    counts = present.sum(dim=1)
    total = int(counts.sum())
    tokens, fillings, width = (total, 0, int(counts.max())) if fixed is None else (fixed.tokens, fixed.fillings, places)
    if fixed is not None:
        tokens += max(0, math.ceil((total - tokens) / fixed.unit)) * fixed.unit
        fillings = max(fillings, math.ceil((tokens - total) / places))
    place = torch.full((tokens,), rows * places)
    place[:total] = present.flatten().nonzero()[:, 0]
    ends = counts.cumsum(0)
    filled = total + torch.arange(1, fillings + 1) * (tokens - total) // max(1, fillings)
    offsets = torch.cat((ends.new_zeros(1), ends, filled))
    lengths = offsets.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths, output_size=tokens)
    slot = sequence * width + torch.arange(tokens) - offsets[sequence]
    return Packing(place, offsets.int(), slot, torch.arange(width) < lengths[:, None])


class Take(torch.autograd.Function):
    """Rows `place` of x, each taken once at most: so the gradient is a copy, not the sum that indexing makes of it."""

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


def take(x: Float[Tensor, "r d"], place: Int64[Tensor, "t"]) -> Float[Tensor, "t d"]:
    """Rows of x at distinct places."""
    taken: Tensor = Take.apply(x, place)
    return taken


def lay(x: Float[Tensor, "t d"], place: Int64[Tensor, "t"], onto: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
    """`onto` with a packing's tokens in their places; filling falls on a spare row, which is cut off."""
    return _with_spare(onto).index_copy(0, place, x)[:-1]


def pick(x: Float[Tensor, "r d"], place: Int64[Tensor, "t"]) -> Float[Tensor, "t d"]:
    """The rows of x that a packing has tokens for; filling is zero."""
    return take(_with_spare(x), place)


def _with_spare(x: Float[Tensor, "r d"]) -> Float[Tensor, "r1 d"]:
    return torch.cat((x, x.new_zeros(1, x.shape[1])))

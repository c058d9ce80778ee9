"""Triton kernel of residual_norm.py: backward pass of layer norm, residual stream and the branch's bias.

A program processes every ways-th tile of whole tokens and keeps its three partial sums in registers until its last
step, one float32 each per element of the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    grad_residual, grad_y, x, mean, rstd, weight, grad, sums, tokens,
    dim: tl.constexpr, ways: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x [tokens, dim], and each way's sums of the three products to `sums` [ways, 3, dim].

    Grid (ways). All arithmetic is in float32; a way without a step writes zeros.
    """
    way, row, column = tl.program_id(0), tl.arange(0, rows), tl.arange(0, columns)
    within = column < dim
    scale = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * dim + column[None, :]
    of_weight = tl.zeros([rows, columns], tl.float32)
    of_bias = tl.zeros([rows, columns], tl.float32)
    of_branch = tl.zeros([rows, columns], tl.float32)
    begin = way.to(tl.int64) * (rows * dim)
    for first in tl.range(way * rows, tokens, ways * rows, num_stages=stages):
        exists = first + row < tokens
        there = exists[:, None] & within[None, :]
        centre = tl.load(mean + first + row, mask=exists, other=0.0)[:, None]
        inverse = tl.load(rstd + first + row, mask=exists, other=0.0)[:, None]
        value = tl.load(x + begin + at, mask=there, other=0.0).to(tl.float32)
        of_y = tl.load(grad_y + begin + at, mask=there, other=0.0).to(tl.float32)
        through = tl.load(grad_residual + begin + at, mask=there, other=0.0).to(tl.float32)
        normed = (value - centre) * inverse
        scaled = of_y * scale
        along = tl.sum(scaled * normed, 1)[:, None] / dim
        average = tl.sum(scaled, 1)[:, None] / dim
        result = (scaled - average - normed * along) * inverse + through
        tl.store(grad + begin + at, result.to(grad.dtype.element_ty), mask=there)
        of_weight += of_y * normed
        of_bias += of_y
        of_branch += through
        begin += ways * rows * dim
    out = sums + way * 3 * dim + column
    tl.store(out, tl.sum(of_weight, 0), mask=within)
    tl.store(out + dim, tl.sum(of_bias, 0), mask=within)
    tl.store(out + 2 * dim, tl.sum(of_branch, 0), mask=within)

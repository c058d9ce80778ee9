"""Triton kernel of GELU's backward pass with fused sums over tokens (mlp.py).

The grid is column blocks × ways. A program processes every ways-th block of rows of its columns. The ways thus read
neighbouring rows at the same time, and their numbers of steps differ by at most one. A program keeps its partial sums
in registers until its last step, one float32 per element of the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from iwm.kernels import gelu

LOG2_TAIL = tl.constexpr(gelu.LOG2_TAIL)
DEGREE = tl.constexpr(len(gelu.LOG2_TAIL) - 1)
LOG2_DENSITY = tl.constexpr(gelu.LOG2_DENSITY)
FAR = tl.constexpr(gelu.FAR)


@triton.jit
def _slope(x):
    """Return gelu'(x) in float32, with the same operations as gelu.slope."""
    a = tl.abs(x)
    exponent = a * LOG2_TAIL[DEGREE] + LOG2_TAIL[DEGREE - 1]
    for power in tl.static_range(DEGREE - 1):
        exponent = exponent * a + LOG2_TAIL[DEGREE - 2 - power]
    below = tl.math.exp2(exponent)
    density = tl.math.exp2(x * x * LOG2_DENSITY[1] + LOG2_DENSITY[0])
    return tl.where(x < 0, below, 1 - below) + tl.where(a < FAR, x, 0.0) * density


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    grad_out, pre, grad, sums, tokens,
    dim: tl.constexpr, ways: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Write grad = grad_out · gelu'(pre) [tokens, dim] in 16 bits, and each way's sums of it to `sums` [ways, dim].

    Grid (column blocks, ways). The sums are of the float32 values before rounding; a way without a step writes zeros.
    """
    way, row = tl.program_id(1), tl.arange(0, rows)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    at = row[:, None] * dim + column[None, :]
    begin = way.to(tl.int64) * (rows * dim)
    total = tl.zeros([rows, columns], tl.float32)
    for first in tl.range(way * rows, tokens, ways * rows, num_stages=stages):
        there = (first + row < tokens)[:, None]
        if dim % columns:
            there = there & (column < dim)[None, :]
        x = tl.load(pre + begin + at, mask=there, other=0.0).to(tl.float32)
        dy = tl.load(grad_out + begin + at, mask=there, other=0.0).to(tl.float32)
        dx = dy * _slope(x)
        tl.store(grad + begin + at, dx.to(grad.dtype.element_ty), mask=there)
        total += dx
        begin += ways * rows * dim
    tl.store(sums + way * dim + column, tl.sum(total, 0), mask=column < dim)

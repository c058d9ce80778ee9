"""The Triton kernel of the MLP's backward pass (mlp.py): through GELU, and the sums over tokens on the way.

Programs stand in a grid of column blocks times ways. A program walks every ways-th block of rows of its columns: so the
ways read neighbouring rows at a time, and differ by one step at most. What it adds up stays in registers, a float32 for
each element of the tile, until its last step.
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
    """gelu'(x), of float32: gelu.slope, operation for operation."""
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
    """grad = grad_out · gelu'(pre) [tokens, dim], 16 bits, and in `sums` [ways, dim] what each way adds up of it.

    Grid (column blocks, ways). Sums are of float32, before it is rounded: those of a way without a step are zero.
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

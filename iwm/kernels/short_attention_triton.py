"""Forward and backward Triton kernels of short attention, for dense and packed sequences (short_attention.py).

One program processes one head of one sequence (forward: one block of its queries). qkv [t, 3 · heads · dim] has the
projection's layout: tokens are `stride` apart, a head's keys follow its queries at a distance of stride / 3, and its
values follow the keys at the same distance. Tiles are `width` columns wide: `dim` rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bounds(offsets, sequence, length):
    """Return a sequence's first token and its number of tokens; without offsets, each has `length` tokens."""
    if offsets is None:
        first = sequence.to(tl.int64) * length
        count = length
    else:
        first = tl.load(offsets + sequence).to(tl.int64)
        count = (tl.load(offsets + sequence + 1) - first).to(tl.int32)
    return first, count


@triton.jit
def _at(rows, count, stride: tl.constexpr, dim: tl.constexpr, width: tl.constexpr):
    """Return the offsets [rows, width] of one head's rows, and the mask of `count` rows and `dim` columns."""
    columns = tl.arange(0, width)[None, :]
    there = rows[:, None] < count
    if dim < width:
        there = there & (columns < dim)
    return rows[:, None] * stride + columns, there


@triton.jit
def _load(base, rows, count, stride: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, whole: tl.constexpr):
    """Load rows of one head, zero outside the sequence. whole: True where all rows are inside."""
    at, there = _at(rows, count, stride, dim, width)
    if whole and dim == width:
        values = tl.load(base + at)
    elif whole:
        values = tl.load(base + at, mask=tl.arange(0, width)[None, :] < dim, other=0.0)
    else:
        values = tl.load(base + at, mask=there, other=0.0)
    return values


@triton.jit
def _store(base, values, rows, count, stride: tl.constexpr, dim: tl.constexpr, width: tl.constexpr):
    """Store the rows of one head that are inside the sequence."""
    at, there = _at(rows, count, stride, dim, width)
    tl.store(base + at, values.to(base.dtype.element_ty), mask=there)


@triton.jit
def _attend_keys(
    q, base, keys, count, scale, highest, total, summed,
    stride: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """Update each query's highest score, sum of weights and weighted sum of values: one step of the online softmax."""
    k = _load(base + stride // 3, keys, count, stride, dim, width, whole)
    v = _load(base + stride // 3 * 2, keys, count, stride, dim, width, whole)
    s = tl.dot(q, tl.trans(k))
    if not whole:
        s = tl.where((keys < count)[None, :], s, float("-inf"))
    higher = tl.maximum(highest, tl.max(s, 1))  # finite: every step has a key
    p = tl.math.exp2(s * scale - (higher * scale)[:, None])
    shrunk = tl.math.exp2((highest - higher) * scale)
    return higher, total * shrunk + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, summed * shrunk[:, None])


@triton.jit
def _attend_queries(
    base, out, lse, begin, count, scale, stride: tl.constexpr, dim: tl.constexpr, width: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr, tail: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Compute the attention of at most `block_q` queries from `begin` on. base: pointer to the head's queries."""
    rows = begin + tl.arange(0, block_q)
    q = _load(base, rows, count, stride, dim, width, False)
    highest = tl.full([block_q], float("-inf"), tl.float32)
    total = tl.zeros([block_q], tl.float32)
    summed = tl.zeros([block_q, width], tl.float32)
    steps = count // block_k * block_k
    for start in tl.range(0, steps, block_k, num_stages=stages):
        keys = start + tl.arange(0, block_k)
        highest, total, summed = _attend_keys(
            q, base, keys, count, scale, highest, total, summed, stride, dim, width, True
        )
    for start in tl.range(steps, count, tail, num_stages=1):
        keys = start + tl.arange(0, tail)
        highest, total, summed = _attend_keys(
            q, base, keys, count, scale, highest, total, summed, stride, dim, width, False
        )
    _store(out, summed / total[:, None], rows, count, stride // 3, dim, width)
    tl.store(lse + rows, highest * scale + tl.math.log2(total), mask=rows < count)


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    qkv, offsets, out, lse, tokens, scale,
    length: tl.constexpr, heads: tl.constexpr, dim: tl.constexpr, width: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr, tail: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Compute the attention of one block of queries of one head.

    Grid (blocks, heads, sequences), so that neighbouring programs share keys.
    scale: factor of the scores in base 2. lse: base-2 log-sum-exp of the scaled scores [heads, tokens].
    """
    begin, head = tl.program_id(0) * block_q, tl.program_id(1)
    first, count = _bounds(offsets, tl.program_id(2), length)
    stride: tl.constexpr = 3 * heads * dim
    base = qkv + first * stride + head * dim
    out += first * heads * dim + head * dim
    lse += head.to(tl.int64) * tokens + first
    if begin + 16 < count:
        _attend_queries(base, out, lse, begin, count, scale, stride, dim, width, block_q, block_k, tail, stages)
    elif begin < count:  # at most 16 queries remain
        _attend_queries(base, out, lse, begin, count, scale, stride, dim, width, 16, block_k, tail, stages)


@triton.jit
def _weigh(q, do, delta, log, k, k_or_zero, v, dq, dk, dv, scale):
    """Add the contributions of one tile of queries and one tile of keys to dQ, dK and dV."""
    s = tl.dot(k, tl.trans(q))
    dp = tl.dot(v, tl.trans(do))
    p = tl.math.exp2(s * scale - log[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv)  # accumulating products overlap with the arithmetic that follows them
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk)
    return tl.dot(tl.trans(ds), k_or_zero, dq), dk, dv


@triton.jit
def _walk(
    base, out, lse, grad_out, grad, k, k_or_zero, v, dk, dv, rows, count, before, scale, scale_qk,
    stride: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, split: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """Process one tile of queries: write its dQ and add to dK and dV of one tile of keys.

    Weights are 0 outside the sequence.
    """
    q = _load(base, rows, count, stride, dim, width, whole)
    do = _load(grad_out, rows, count, stride // 3, dim, width, whole)
    o = _load(out, rows, count, stride // 3, dim, width, whole)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    log = tl.load(lse + rows) if whole else tl.load(lse + rows, mask=rows < count, other=float("inf"))
    dq = tl.zeros([q.shape[0], width], tl.float32)
    dq, dk, dv = _weigh(q, do, delta, log, k, k_or_zero, v, dq, dk, dv, scale)
    dq *= scale_qk
    if split:
        dq += _load(grad, rows, tl.where(before, count, 0), stride, dim, width, False).to(tl.float32)
    _store(grad, dq, rows, count, stride, dim, width)
    return dk, dv


@triton.jit
def _tile(base, keys, count, stride: tl.constexpr, dim: tl.constexpr, width: tl.constexpr):
    """Return a tile's keys, the same keys with 0 beyond the sequence, and its values.

    Beyond the sequence its last key is repeated, so that no weight overflows and no step needs a mask. These weights
    add nothing to dQ, which uses the keys with 0. Their contributions to dK and dV are neither written nor summed.
    """
    there = tl.minimum(keys, count - 1)
    k = _load(base + stride // 3, there, count, stride, dim, width, True)
    v = _load(base + stride // 3 * 2, there, count, stride, dim, width, True)
    return k, tl.where((keys < count)[:, None], k, 0.0), v


@triton.jit
def _finish(
    grad, sums, dk, dv, keys, count, before, scale_qk,
    stride: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of a tile of keys, and add their sums over keys inside the sequence to the sequence's sums."""
    _store(grad + stride // 3, dk * scale_qk, keys, count, stride, dim, width)
    _store(grad + stride // 3 * 2, dv, keys, count, stride, dim, width)
    dk, dv = tl.where((keys < count)[:, None], dk, 0.0), tl.where((keys < count)[:, None], dv, 0.0)
    _add(sums + stride // 3, tl.sum(dk, 0) * scale_qk, before, dim, width, split)  # 0 in exact arithmetic
    _add(sums + stride // 3 * 2, tl.sum(dv, 0), before, dim, width, split)


@triton.jit
def _add(sums, values, before, dim: tl.constexpr, width: tl.constexpr, split: tl.constexpr):
    """Write one head's sums, plus the sums that this program itself wrote before (`before`)."""
    columns = tl.arange(0, width)
    if split:
        values += tl.load(sums + columns, mask=(columns < dim) & before, other=0.0)
    tl.store(sums + columns, values, mask=columns < dim)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    qkv, offsets, out, lse, grad_out, grad_qkv, sums, tokens, scale, scale_qk,
    length: tl.constexpr, heads: tl.constexpr, dim: tl.constexpr, width: tl.constexpr,
    block_q: tl.constexpr, block_k: tl.constexpr, tail: tl.constexpr, stages: tl.constexpr, split: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one head of one sequence and its sums over the tokens. Grid (heads, sequences).

    Scores are stored transposed, [keys, queries]. Weights and their gradients are then, in their register layout, the
    left operands of the products for dV and dK; only dQ needs a transposition.
    sums: [sequences, 3, heads, dim] in float32, 0 for an empty sequence.
    scale: factor of the scores in base 2. scale_qk: factor of the scores, for the gradients of queries and keys.
    split: True where a sequence can have more keys than one pass over its queries takes. There is then one pass for
    each block of keys, and every pass after the first adds to the dQ that this program itself wrote before.
    """
    head = tl.program_id(0)
    first, count = _bounds(offsets, tl.program_id(1), length)
    stride: tl.constexpr = 3 * heads * dim
    base = qkv + first * stride + head * dim
    out, grad_out = out + first * heads * dim + head * dim, grad_out + first * heads * dim + head * dim
    grad = grad_qkv + first * stride + head * dim
    sums += tl.program_id(1).to(tl.int64) * stride + head * dim
    lse += head.to(tl.int64) * tokens + first
    if offsets is not None and count == 0:
        for part in tl.static_range(1, 3):
            _add(sums + stride // 3 * part, tl.zeros([width], tl.float32), False, dim, width, False)
    for begin in tl.range(0, count, block_k, num_stages=1):
        keys = begin + tl.arange(0, block_k)
        k, k_or_zero, v = _tile(base, keys, count, stride, dim, width)
        dk, dv = tl.zeros([block_k, width], tl.float32), tl.zeros([block_k, width], tl.float32)
        steps = count // block_q * block_q
        for start in tl.range(0, steps, block_q, num_stages=stages):
            rows = start + tl.arange(0, block_q)
            dk, dv = _walk(
                base, out, lse, grad_out, grad, k, k_or_zero, v, dk, dv, rows, count, begin > 0, scale, scale_qk,
                stride, dim, width, split, True,
            )  # fmt: skip
        for start in tl.range(steps, count, tail, num_stages=1):
            rows = start + tl.arange(0, tail)
            dk, dv = _walk(
                base, out, lse, grad_out, grad, k, k_or_zero, v, dk, dv, rows, count, begin > 0, scale, scale_qk,
                stride, dim, width, split, False,
            )  # fmt: skip
        _finish(grad, sums, dk, dv, keys, count, begin > 0, scale_qk, stride, dim, width, split)
        tl.debug_barrier()  # values that are read again may have been written by another thread
    total = tl.zeros([128, width], tl.float32)
    for start in tl.range(0, count, 128, num_stages=1):  # dQ is read back: a running sum would take registers
        total += _load(grad, start + tl.arange(0, 128), count, stride, dim, width, False).to(tl.float32)
    _add(sums, tl.sum(total, 0), False, dim, width, False)

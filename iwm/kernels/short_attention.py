"""Self-attention in short sequences, from the projection's output to the gradient of it, as two Triton kernels.

Where sequences have a few hundred tokens, one program holds the gradients of many or all keys of a sequence and head in
registers while it walks the queries. So the backward pass is one kernel: nothing is added up by atomics, prepared or
converted by other kernels. Queries, keys and values are read where the projection wrote them, and their gradient is
written as one buffer of the same layout, with its sums over each sequence: those of the projection's bias.

Running needs Triton and a GPU (or TRITON_INTERPRET=1, which is how the tests run on CPUs).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 256
"""Tokens that a sequence can have at most. Longer ones would come out right too, but nobody measured them."""


class AttentionTiling(NamedTuple):
    """The shape of one kernel's work; tiles are cut down to the longest sequence, rounded up to a power of two."""

    queries: int
    """Queries at a time: of a program (forward), of a step of the inner loop (backward)."""
    keys: int
    """Keys at a time: of a step of the loop (forward), of a walk along all queries (backward)."""
    tail: int
    """What the inner loop goes on with where less than a whole step is left: 196 = 3 · 64 + 4 tokens want 16 here."""
    warps: int
    stages: int
    """Steps of the inner loop whose loads are in flight, the current one included."""
    registers: int | None = None
    """The most a thread may have; None: what the compiler finds best."""
    tiles: int = 1
    """1 or 2 (backward): into how many the keys of a walk are cut, which takes the registers of one tile's scores."""
    fixed: bool = True
    """Compile the backward pass of dense sequences for their length."""


TILINGS: dict[tuple[str, str, int], AttentionTiling] = {
    # by pass, kind of lengths and head dimension (rounded up to a power of two)
    ("forward", "dense", 32): AttentionTiling(64, 64, 16, 4, 1),
    ("forward", "dense", 64): AttentionTiling(64, 64, 16, 4, 2),
    ("forward", "packed", 32): AttentionTiling(64, 64, 64, 4, 2),
    ("forward", "packed", 64): AttentionTiling(64, 64, 64, 4, 2),
    ("backward", "dense", 32): AttentionTiling(32, 128, 16, 4, 2),
    ("backward", "dense", 64): AttentionTiling(64, 128, 16, 8, 2),
    ("backward", "packed", 32): AttentionTiling(32, 128, 32, 4, 2),
    ("backward", "packed", 64): AttentionTiling(32, 64, 32, 4, 1, 168),
}
"""The fastest of a handful that were tried on an H100; what is not here takes PLAIN."""

PLAIN = AttentionTiling(32, 64, 32, 4, 1)


def _tiling(phase: str, offsets: Tensor | None, width: int, most: int) -> AttentionTiling:
    tiling = TILINGS.get((phase, "dense" if offsets is None else "packed", width), PLAIN)
    queries, keys, tail = (min(most, size) for size in tiling[:3])
    tail = min(tail, keys if phase == "forward" else queries)
    return tiling._replace(queries=queries, keys=keys, tail=tail, tiles=min(tiling.tiles, keys // 16))


LOG2_E = 1.4426950408889634


def _shape(qkv: Tensor, heads: int, offsets: Tensor | None, length: int) -> tuple[int, int, int, int]:
    """The head dimension, the width of tiles, the longest length rounded up, the number of sequences."""
    dim = qkv.shape[1] // (3 * heads)
    sequences = qkv.shape[0] // length if offsets is None else offsets.shape[0] - 1
    return dim, max(16, _power_of_two(dim)), max(16, _power_of_two(length)), sequences


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@torch.library.custom_op("iwm::short_attention", mutates_args=())
def attend(qkv: Tensor, heads: int, offsets: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """The attended values [t, heads · dim] and the base-2 log-sum-exp of the scaled scores [heads, t]."""
    from iwm.kernels.short_attention_triton import forward_kernel

    dim, width, most, sequences = _shape(qkv, heads, offsets, length)
    tokens = qkv.shape[0]
    out, lse = qkv.new_empty(tokens, heads * dim), qkv.new_empty(heads, tokens, dtype=torch.float32)
    tiling = _tiling("forward", offsets, width, most)
    if tokens and sequences:
        forward_kernel[-(-length // tiling.queries), heads, sequences](
            qkv, offsets, out, lse, tokens, dim**-0.5 * LOG2_E, length if offsets is None else 0, heads, dim, width,
            tiling.queries, tiling.keys, tiling.tail, tiling.stages, num_warps=tiling.warps, maxnreg=tiling.registers,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("iwm::short_attention_backward", mutates_args=())
def attend_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, offsets: Tensor | None, length: int
) -> tuple[Tensor, Tensor]:
    """The gradient of qkv [t, 3 · heads · dim], and its sums over each sequence [s, 3, heads, dim] in float32."""
    from iwm.kernels.short_attention_triton import backward_kernel

    dim, width, most, sequences = _shape(qkv, heads, offsets, length)
    tokens, grad_qkv, grad_out = qkv.shape[0], torch.empty_like(qkv), grad_out.contiguous()
    sums = qkv.new_empty(sequences, 3, heads, dim, dtype=torch.float32)
    tiling = _tiling("backward", offsets, width, most)
    if tokens and sequences:
        backward_kernel[heads, sequences](
            qkv, offsets, out, lse, grad_out, grad_qkv, sums, tokens, length, dim**-0.5 * LOG2_E, dim**-0.5,
            length if offsets is None and tiling.fixed else 0, heads, dim, width,
            tiling.queries, tiling.keys // tiling.tiles, tiling.tail, tiling.stages, most > tiling.keys,
            tiling.tiles > 1, num_warps=tiling.warps, maxnreg=tiling.registers,
        )  # fmt: skip
        return grad_qkv, sums
    return grad_qkv, sums.zero_()


@attend.register_fake
def _(qkv: Tensor, heads: int, offsets: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    tokens, wide = qkv.shape
    return qkv.new_empty(tokens, wide // 3), qkv.new_empty(heads, tokens, dtype=torch.float32)


@attend_backward.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, offsets: Tensor | None, length: int
) -> tuple[Tensor, Tensor]:
    dim, _, _, sequences = _shape(qkv, heads, offsets, length)
    return torch.empty_like(qkv), qkv.new_empty(sequences, 3, heads, dim, dtype=torch.float32)


def _checked(qkv: Tensor, heads: int, offsets: Tensor | None, length: int) -> Tensor:
    assert qkv.is_contiguous()
    assert 0 < length <= LONGEST
    assert qkv.shape[1] % (3 * heads) == 0
    assert offsets is not None or qkv.shape[0] % length == 0
    return qkv


class ProjectedAttention(torch.autograd.Function):
    """The projection to queries, keys and values, and the attention of those, with one backward pass for both.

    The gradient of the projection's bias is the sum of that of qkv, 4.6 kB a token of width 768, which a kernel of its
    own would read once more; here it is left by the one that writes it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, offsets: Tensor | None, length: int
    ) -> Tensor:
        narrow = x.bfloat16()
        qkv = F.linear(narrow, weight.bfloat16(), None if bias is None else bias.bfloat16())
        out, lse = attend(_checked(qkv, heads, offsets, length), heads, offsets, length)
        ctx.save_for_backward(narrow, weight, qkv, out, lse, offsets)
        ctx.heads, ctx.length, ctx.kind, ctx.bias_kind = heads, length, x.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        x, weight, qkv, out, lse, offsets = ctx.saved_tensors
        grad_qkv, sums = attend_backward(grad_out, qkv, out, lse, ctx.heads, offsets, ctx.length)
        grad_x = (grad_qkv @ weight.bfloat16()).to(ctx.kind)
        grad_weight = (grad_qkv.t() @ x).to(weight.dtype)
        grad_bias = None if ctx.bias_kind is None else sums.sum(0).flatten().to(ctx.bias_kind)
        return grad_x, grad_weight, grad_bias, None, None, None


def projected_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, offsets: Tensor | None, length: int
) -> Tensor:
    """Short attention of the projection of x [t, w] by weight [3 · heads · dim, w]: [t, heads · dim] in bf16.

    x, weight and bias may be float32, as under autocast: they are multiplied in bf16, and get gradients of their own
    kind. The projection's columns are queries, keys, values, each head after head, as timm's.
    offsets: int32 [s + 1] from 0 to t, where each sequence begins and the last one ends; sequences may be empty. None:
    t / length sequences of `length` tokens each.
    length: that of the longest sequence, or a bound on it, at most 256. Nothing checks it against the offsets, for that
    would wait for the device: what lies beyond is left unwritten.
    """
    out: Tensor = ProjectedAttention.apply(x, weight, bias, heads, offsets, length)
    return out

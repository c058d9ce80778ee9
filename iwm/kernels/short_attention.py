"""Fused self-attention for short sequences, as two Triton kernels.

For sequences of a few hundred tokens, one program keeps the gradients of many or all keys of a sequence and head in
registers while it iterates over the queries. The backward pass is therefore one kernel, without atomics and without
extra kernels that prepare or convert. Queries, keys and values are read in the projection's layout. Their gradient is
written as one buffer of the same layout, with its sums over each sequence, which give the gradient of the projection's
bias.

Requires Triton and a GPU, or TRITON_INTERPRET=1 (as the tests on CPUs set it).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from iwm.kernels.bf16_weights import copies, weight_gradient

LONGEST = 256
"""Maximum sequence length (tokens). Longer sequences would be computed correctly, but were never measured."""


class AttentionTiling(NamedTuple):
    """Tile sizes and launch options of one kernel.

    Tiles are cut down to the longest sequence, rounded up to a power of two.
    """

    queries: int
    """Queries per program (forward) or per step of the inner loop (backward)."""
    keys: int
    """Keys per step of the loop (forward) or per pass over all queries (backward)."""
    tail: int
    """Step size of the inner loop for the remainder of less than one full step; 16 suits 196 = 3 · 64 + 4 tokens."""
    warps: int
    stages: int
    """Steps of the inner loop whose loads are in flight, including the current one."""
    registers: int | None = None
    """Maximum number of registers per thread; None: the compiler's choice."""


TILINGS: dict[tuple[str, str, int], AttentionTiling] = {
    # Keys: pass, dense or packed sequences, head dimension rounded up to a power of two.
    ("forward", "dense", 32): AttentionTiling(64, 64, 16, 4, 1),
    ("forward", "dense", 64): AttentionTiling(64, 64, 16, 4, 2),
    ("forward", "packed", 32): AttentionTiling(64, 64, 64, 4, 2),
    ("forward", "packed", 64): AttentionTiling(64, 64, 64, 4, 2),
    ("backward", "dense", 32): AttentionTiling(32, 128, 16, 4, 3),
    ("backward", "dense", 64): AttentionTiling(64, 128, 16, 8, 2),
    ("backward", "packed", 32): AttentionTiling(32, 128, 32, 4, 2),
    ("backward", "packed", 64): AttentionTiling(32, 64, 32, 4, 1, 168),
}
"""Fastest of a handful of tilings measured on an H100; any other shape uses PLAIN."""

PLAIN = AttentionTiling(32, 64, 32, 4, 1)


def _tiling(phase: str, offsets: Tensor | None, width: int, most: int) -> AttentionTiling:
    tiling = TILINGS.get((phase, "dense" if offsets is None else "packed", width), PLAIN)
    queries, keys, tail = (min(most, size) for size in tiling[:3])
    tail = min(tail, keys if phase == "forward" else queries)
    return tiling._replace(queries=queries, keys=keys, tail=tail)


LOG2_E = 1.4426950408889634


def _shape(qkv: Tensor, heads: int, offsets: Tensor | None, length: int) -> tuple[int, int, int, int]:
    """Return the head dimension, the tile width, the longest length rounded up, and the number of sequences."""
    dim = qkv.shape[1] // (3 * heads)
    sequences = qkv.shape[0] // length if offsets is None else offsets.shape[0] - 1
    return dim, max(16, _power_of_two(dim)), max(16, _power_of_two(length)), sequences


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@torch.library.custom_op("iwm::short_attention", mutates_args=())
def attend(qkv: Tensor, heads: int, offsets: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Return the attended values [t, heads · dim] and the base-2 log-sum-exp of the scaled scores [heads, t]."""
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
    """Return the gradient of qkv [t, 3 · heads · dim] and its float32 sums over each sequence [s, 3, heads, dim]."""
    from iwm.kernels.short_attention_triton import backward_kernel

    dim, width, most, sequences = _shape(qkv, heads, offsets, length)
    tokens, grad_qkv, grad_out = qkv.shape[0], torch.empty_like(qkv), grad_out.contiguous()
    sums = qkv.new_empty(sequences, 3, heads, dim, dtype=torch.float32)
    tiling = _tiling("backward", offsets, width, most)
    if tokens and sequences:
        backward_kernel[heads, sequences](
            qkv, offsets, out, lse, grad_out, grad_qkv, sums, tokens, dim**-0.5 * LOG2_E, dim**-0.5,
            length if offsets is None else 0, heads, dim, width, tiling.queries, tiling.keys, tiling.tail,
            tiling.stages, most > tiling.keys, num_warps=tiling.warps, maxnreg=tiling.registers,
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


@register_flop_formula([torch.ops.iwm.short_attention, torch.ops.iwm.short_attention_backward])
def _flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Return an upper bound of the FLOPs: two products of the forward pass, five of the backward pass.

    torch's partitioner asks for it before it recomputes a kernel, so an attention without FLOPs would be recomputed
    first. Packed sequences count with the length of the longest.
    """
    backward = len(shapes) == 7
    qkv, length = shapes[1 if backward else 0], shapes[-1]
    return (10 if backward else 4) * qkv[0] * length * (qkv[1] // 3)


def _checked(qkv: Tensor, heads: int, offsets: Tensor | None, length: int) -> Tensor:
    assert qkv.is_contiguous()
    assert 0 < length <= LONGEST
    assert qkv.shape[1] % (3 * heads) == 0
    assert offsets is not None or qkv.shape[0] % length == 0
    return qkv


class ProjectedAttention(torch.autograd.Function):
    """Projection to queries, keys and values, followed by attention, with one backward pass for both.

    The gradient of the projection's bias is the sum of qkv's gradient over the tokens. A separate kernel would read
    that gradient again (4.6 kB per token of width 768), so the kernel that writes it also sums it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_copy: Tensor,
        bias_copy: Tensor | None,
        heads: int,
        offsets: Tensor | None,
        length: int,
    ) -> Tensor:
        narrow = x.bfloat16()
        qkv = F.linear(narrow, weight_copy, bias_copy)
        out, lse = attend(_checked(qkv, heads, offsets, length), heads, offsets, length)
        ctx.save_for_backward(narrow, weight_copy, qkv, out, lse, offsets)
        ctx.heads, ctx.length = heads, length
        ctx.kinds = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, qkv, out, lse, offsets = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.kinds
        grad_qkv, sums = attend_backward(grad_out, qkv, out, lse, ctx.heads, offsets, ctx.length)
        grad_x = (grad_qkv @ weight).to(of_x)
        grad_bias = None if of_bias is None else sums.sum(0).flatten().to(of_bias)
        return grad_x, weight_gradient(grad_qkv, x, of_weight), grad_bias, None, None, None, None, None


class ShortAttention(torch.autograd.Function):
    """Attention of queries, keys and values that are already projected."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, offsets: Tensor | None, length: int) -> Tensor:
        qkv = qkv.contiguous()
        out, lse = attend(_checked(qkv, heads, offsets, length), heads, offsets, length)
        ctx.save_for_backward(qkv, out, lse, offsets)
        ctx.heads, ctx.length = heads, length
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, out, lse, offsets = ctx.saved_tensors
        grad_qkv, _ = attend_backward(grad_out, qkv, out, lse, ctx.heads, offsets, ctx.length)
        return grad_qkv, None, None, None


def short_attention(qkv: Tensor, heads: int, offsets: Tensor | None, length: int) -> Tensor:
    """Return the attention [t, heads · dim] of bf16 qkv [t, 3 · heads · dim]; see projected_attention."""
    out: Tensor = ShortAttention.apply(qkv, heads, offsets, length)
    return out


def projected_attention(x: Tensor, projection: nn.Linear, heads: int, offsets: Tensor | None, length: int) -> Tensor:
    """Project x [t, w] to queries, keys and values and return their attention [t, heads · dim] in bf16.

    x and the projection may be float32, as under autocast: the products are computed in bf16, and each gradient has its
    tensor's own dtype. The projection's outputs [3 · heads · dim] are queries, keys, values, each head by head, as in
    timm. offsets: int32 [s + 1] from 0 to t, the start of each sequence and the end of the last; sequences may be
    empty. None: t / length sequences of `length` tokens each.
    length: the length of the longest sequence or an upper bound of it, at most 256. It is not checked against the
    offsets, because the check would synchronise with the device; tokens beyond it are left unwritten.
    """
    out: Tensor = ProjectedAttention.apply(
        x, projection.weight, projection.bias, *copies(projection), heads, offsets, length
    )
    return out

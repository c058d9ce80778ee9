"""Layer norm of a residual stream with one backward kernel for everything that happens where branches join.

A block adds a branch (attention or MLP) to the residual stream and normalises the stream for the next branch:

    y = norm(x),    x' = x + branch(y) + b,

where b is the bias of the branch's last layer. Backward, with g_y and g' the gradients of y and x', this needs the
gradients of x, of norm's weight and bias, and of b, which is g' summed over the tokens. Compiled by Inductor these are
three kernels, which read g' and x twice and g_y twice. Here one Triton kernel reads each of the three once: 8 bytes per
element with the gradient of x that it writes, instead of 14.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class NormTiling(NamedTuple):
    """Tile size and launch options of the kernel."""

    elements: int
    """Elements per step of a program, in whole tokens, at least one."""
    warps: int
    stages: int
    """Steps whose loads are in flight, including the current one."""
    programs: int
    """Number of programs. Each writes three rows of sums, so more of them cost memory traffic."""


TILING = NormTiling(4096, 16, 3, 132)
"""Tiling in use; a benchmark may replace it. The fastest of five timed on an H100: one program for each multiprocessor,
with 16 warps of 97 registers per thread and 48 KiB of shared memory for the loads in flight. Its 86 µs for the
context encoder (with two stages 116) compare with 55 µs for the bytes alone at 3 TB/s."""


@torch.library.custom_op("iwm::residual_norm_backward", mutates_args=())
def residual_norm_backward(
    grad_residual: Tensor, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x [t, d], and float32 partial sums over the tokens [ways, 3, d].

    The sums are the gradients of norm's weight, of norm's bias, and grad_residual. mean, rstd: float32 [t], statistics
    of x. weight: [d].
    """
    # Imported here because Triton comes only with torch's GPU builds.
    from iwm.kernels.residual_norm_triton import backward_kernel

    (tokens, dim), ways = x.shape, TILING.programs
    grad, sums = x.new_empty(tokens, dim), x.new_empty(ways, 3, dim, dtype=torch.float32)
    columns = 1 << (dim - 1).bit_length()
    backward_kernel[(ways,)](
        grad_residual.contiguous(), grad_y.contiguous(), x.contiguous(), mean, rstd, weight, grad, sums, tokens,
        dim, ways, max(1, TILING.elements // columns), columns, TILING.stages, num_warps=TILING.warps,
    )  # fmt: skip
    return grad, sums


@residual_norm_backward.register_fake
def _(
    grad_residual: Tensor, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(TILING.programs, 3, x.shape[1], dtype=torch.float32)


class ResidualNorm(torch.autograd.Function):
    """Layer norm in float32 with a bf16 result, and x + branch_bias: x [..., d] → residual like x, y bf16 [..., d].

    The residual is not written to memory where Inductor compiles this: adding the branch computes it again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        # Inductor computes the sum of stream and branch in each kernel that uses it, unless a view makes it write it.
        x = x.as_strided(x.shape, x.stride())
        y, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.kinds = weight.dtype, bias.dtype, branch_bias.dtype
        residual = x + branch_bias
        # Only a real cast: torch 2.11's compiler drops the gradient of an output that a cast returned as it was.
        return residual if residual.dtype == x.dtype else residual.to(x.dtype), y.to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        (grad_residual, grad_y), (x, mean, rstd, weight) = gradients, ctx.saved_tensors
        rows = (tensor.flatten(0, -2) for tensor in (grad_residual, grad_y, x))
        grad, sums = residual_norm_backward(*rows, mean.flatten(), rstd.flatten(), weight)
        of_weight, of_bias, of_branch = (part.to(kind) for part, kind in zip(sums.sum(0), ctx.kinds, strict=True))
        return grad.view_as(x), of_weight, of_bias, of_branch, None


def residual_norm(x: Tensor, norm: nn.LayerNorm, branch_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return x + branch_bias and norm(x) in bf16, from x [..., d]; branch_bias [d] is that of the branch's last layer.

    Adding the branch without its bias to the first completes the residual stream.
    """
    residual, y = ResidualNorm.apply(x, norm.weight, norm.bias, branch_bias, norm.eps)
    return residual, y

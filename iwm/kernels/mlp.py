"""timm's MLP with a backward pass that reads the gradient before GELU once less.

Compiled, the backward pass from the hidden layer is: dy = g W2, by cuBLAS; dx = dy gelu'(x), by Inductor; the gradient
of fc1's bias, dx summed over the tokens, for which Inductor reads dx again: 2 bytes of 8 an element, 6 kB of a token at
D = 3072. Here one Triton kernel writes dx and adds it up: 6 bytes an element are left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm.compat import HAS_TRITON
from iwm.kernels.gelu import Gelu, gelu


class MlpTiling(NamedTuple):
    """The shape of the kernel's work."""

    rows: int
    columns: int
    """Columns of the tile that a step takes: 256 columns of 16 bits are 16 bytes for each thread of a warp."""
    warps: int
    stages: int
    """Steps whose loads are in flight, the current one included; from 2 on by way of shared memory."""
    programs: int
    """Programs in all, roughly. Each leaves a row of sums; if all run at once, none is left over at the end."""
    registers: int | None = None
    """The most a thread may have; None: what the compiler finds best."""


TILING = MlpTiling(8, 256, 4, 3, 132 * 8)
"""What is taken; a benchmark may put another here. It has 56 registers and 16 KiB of shared memory, so nine programs
fit on an H100's processor; eight on each of the 132 are 88 ways at D = 3072, 176 at 1536, each of 35 to 40 steps."""


def _ways(dim: int) -> int:
    """Programs that share the rows of one block of columns."""
    return max(1, TILING.programs // ((dim + TILING.columns - 1) // TILING.columns))


@torch.library.custom_op("iwm::gelu_backward_bias", mutates_args=())
def gelu_backward_bias(grad_out: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """grad_out · gelu'(pre), 16 bits [t, d], and float32 sums [ways, d] that together are its sum over the tokens."""
    # Triton, which the kernel is written in, is only where torch has a GPU.
    from iwm.kernels.gelu_backward_triton import backward_kernel

    (tokens, dim), ways = pre.shape, _ways(pre.shape[1])
    grad_out, pre = grad_out.contiguous(), pre.contiguous()
    grad, sums = torch.empty_like(pre), pre.new_empty(ways, dim, dtype=torch.float32)
    columns = min(TILING.columns, 1 << (dim - 1).bit_length())
    backward_kernel[-(-dim // columns), ways](
        grad_out, pre, grad, sums, tokens, dim, ways, TILING.rows, columns, TILING.stages,
        num_warps=TILING.warps, maxnreg=TILING.registers,
    )  # fmt: skip
    return grad, sums


@gelu_backward_bias.register_fake
def _(grad_out: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    tokens, dim = pre.shape
    return pre.new_empty(tokens, dim), pre.new_empty(_ways(dim), dim, dtype=torch.float32)


class LinearGelu(torch.autograd.Function):
    """gelu(x W' + b) in bf16: x [..., e], weight [d, e], bias [d] of any floating type → [..., d].

    Autocast leaves what is inside a Function of ours to us: what comes in is cast here, and gradients are cast back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.kinds = x.dtype, weight.dtype, bias.dtype
        x, weight, bias = x.to(torch.bfloat16), weight.to(torch.bfloat16), bias.to(torch.bfloat16)
        pre = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, pre)
        return gelu(pre.float()).to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad_out,), (x, weight, pre) = gradients, ctx.saved_tensors
        grad, sums = gelu_backward_bias(grad_out.flatten(0, -2), pre.flatten(0, -2))
        grad_x, grad_weight = (grad @ weight).view_as(x), grad.t() @ x.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.kinds
        return grad_x.to(of_x), grad_weight.to(of_weight), sums.sum(0).to(of_bias)


class Mlp(timm.layers.Mlp):
    """timm's Mlp, parameter for parameter; by LinearGelu where compiled for training on a GPU in bf16 autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., e] → [..., e]."""
        if not self.fuses(x):
            plain: Tensor = super().forward(x)
            return plain
        hidden = LinearGelu.apply(x, self.fc1.weight, self.fc1.bias)
        y: Tensor = self.drop2(self.fc2(self.norm(self.drop1(hidden))))
        return y

    def fuses(self, x: Tensor) -> bool:
        """Tell whether fc1 and GELU go by LinearGelu. Uncompiled, its GELU would be thirty kernels."""
        return (
            torch.compiler.is_compiling()
            and HAS_TRITON
            and x.is_cuda
            and torch.is_grad_enabled()
            and torch.is_autocast_enabled("cuda")
            and torch.get_autocast_dtype("cuda") == torch.bfloat16
            and isinstance(self.act, Gelu)
            and isinstance(self.fc1, nn.Linear)
            and self.fc1.bias is not None
        )

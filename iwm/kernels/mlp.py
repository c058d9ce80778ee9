"""timm's MLP with GELU's backward pass and fc1's bias gradient fused in one kernel.

Compiled by Inductor, the backward pass from the hidden layer has three steps: dy = g W2 (cuBLAS), dx = dy gelu'(x), and
the gradient of fc1's bias, which is dx summed over the tokens. The last step reads dx again: 2 of 8 bytes per element,
6 kB per token at D = 3072. Here one Triton kernel writes dx and sums it, which leaves 6 bytes per element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm.compat import HAS_TRITON, matmul_dtype
from iwm.kernels.bf16_weights import copies, linear, weight_gradient
from iwm.kernels.gelu import Gelu, gelu


class MlpTiling(NamedTuple):
    """Tile sizes and launch options of the kernel."""

    rows: int
    columns: int
    """Columns per tile: 256 columns of 16 bits are 16 bytes for each thread of a warp."""
    warps: int
    stages: int
    """Steps whose loads are in flight, including the current one; 2 or more use shared memory."""
    programs: int
    """Approximate number of programs. Each writes one row of sums; there is no tail if all run at the same time."""
    registers: int | None = None
    """Maximum number of registers per thread; None: the compiler's choice."""


TILING = MlpTiling(8, 256, 4, 3, 132 * 8)
"""Tiling in use; a benchmark may replace it. It needs 56 registers per thread and 16 KiB of shared memory, so nine
programs fit on one of an H100's 132 multiprocessors. Eight on each are 88 ways at D = 3072 and 176 at 1536, with 35 to
40 steps each."""


def _ways(dim: int) -> int:
    """Return the number of programs that share the rows of one block of columns."""
    return max(1, TILING.programs // ((dim + TILING.columns - 1) // TILING.columns))


@torch.library.custom_op("iwm::gelu_backward_bias", mutates_args=())
def gelu_backward_bias(grad_out: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Return grad_out · gelu'(pre) [t, d] in 16 bits, and its float32 partial sums over the tokens [ways, d]."""
    # Imported here because Triton comes only with torch's GPU builds.
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

    weight_copy, bias_copy: both in bf16. Autocast does not reach inside a custom Function: x is cast here, and
    gradients have their tensors' dtypes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, weight_copy: Tensor, bias_copy: Tensor) -> Tensor:
        ctx.kinds = x.dtype, weight.dtype, bias.dtype
        x = x.to(torch.bfloat16)
        pre = F.linear(x, weight_copy, bias_copy)
        ctx.save_for_backward(x, weight_copy, pre)
        return gelu(pre.float()).to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,), (x, weight, pre) = gradients, ctx.saved_tensors
        grad, sums = gelu_backward_bias(grad_out.flatten(0, -2), pre.flatten(0, -2))
        of_x, of_weight, of_bias = ctx.kinds
        grad_x = (grad @ weight).view_as(x).to(of_x)
        return grad_x, weight_gradient(grad, x.flatten(0, -2), of_weight), sums.sum(0).to(of_bias), None, None


class Mlp(timm.layers.Mlp):
    """timm's Mlp with the same parameters, which uses LinearGelu where `fuses` allows it."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., e] to [..., e]."""
        y: Tensor = self.drop2(linear(self.fc2, self.hidden(x)))
        return y

    def hidden(self, x: Tensor) -> Tensor:
        """Return the hidden layer [..., d], which fc2 maps to the output."""
        if self.fuses(x):
            hidden = LinearGelu.apply(x, self.fc1.weight, self.fc1.bias, *copies(self.fc1))
        else:
            hidden = self.act(linear(self.fc1, x))
        y: Tensor = self.norm(self.drop1(hidden))
        return y

    def fuses(self, x: Tensor) -> bool:
        """Return True where fc1 and GELU run as LinearGelu: compiled, in training, on a GPU, under bf16 autocast.

        Uncompiled, its GELU would be thirty kernels.
        """
        return (
            torch.compiler.is_compiling()
            and HAS_TRITON
            and x.is_cuda
            and torch.is_grad_enabled()
            and matmul_dtype(x) == torch.bfloat16
            and isinstance(self.act, Gelu)
            and type(self.fc1) is nn.Linear  # a subclass (float8) computes another product
            and self.fc1.bias is not None
        )

"""Exact GELU for 16-bit activations with half of torch's instructions.

Compiled, torch's GELU uses libdevice's erf and exp: 36 instructions per element forward and 51 backward (machine code
for sm_90), so both passes are bound by arithmetic. This one needs 18 and 25, also in float32, and is bound by memory
bandwidth on an H100. With the normal distribution's tail Q(a) = erfc(a / sqrt 2) / 2 = Phi(-a) at a = |x|,

    gelu(x)  = max(x, 0) - a Q(a)
    gelu'(x) = Phi(x) + x phi(x),    Phi(x) = Q(a) for x < 0, 1 - Q(a) otherwise.

log2 Q is smooth enough for a polynomial of degree 10, and exp2 of a float32 is one instruction. The error is relative
to Q, so the negative tail, where 1 + erf cancels, keeps its digits. The comparison assumes an exact erf for torch:

| error | this module | torch |
| --- | --- | --- |
| largest absolute error of gelu, of gelu' | 2.4e-7, 5.3e-7 | 4.5e-7, 1.3e-7 |
| largest relative error of gelu, -4 < x < 0 | 1.9e-6 | 4.7e-4 |
| gelu in bfloat16: within one unit in the last place | from x = -9.5 on | from x = -4.8 on |
| gelu in bfloat16: values of 65280 not rounded to nearest | 189 | 197 |

Below -9, |gelu| is under 1e-17 and goes to zero. Infinities give the limits; NaN stays NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG2_TAIL = (
    -9.9999887e-01, -1.1511459e+00, -4.5896468e-01, -5.3048454e-02, 7.6745492e-03, -4.9833243e-04,
    -7.305449e-05, 2.3738636e-05, -2.8820807e-06, 1.7573329e-07, -4.41573e-09,
)  # fmt: skip
"""Coefficients of log2 Q(a), lowest degree first, by Remez exchange. They minimise the largest relative error of Q,
which is 7.7e-7 up to a = 4 and grows to 7.7e-4 at 9. The last coefficient is negative, so beyond 9 the polynomial falls
to -inf, and exp2 to zero."""

LOG2_DENSITY = (-math.log2(math.tau) / 2, -math.log2(math.e) / 2)
"""Constant and coefficient of x² of log2 phi(x), where phi is the normal density."""
FAR = 16.0
"""|x| from which Q and phi are zero in float32. It bounds their factors, because infinity times zero is NaN."""


def tail(a: Tensor) -> Tensor:
    """Return Q(a) = Phi(-a) of float32 a >= 0."""
    exponent = LOG2_TAIL[-1] * a + LOG2_TAIL[-2]
    for coefficient in reversed(LOG2_TAIL[:-2]):
        exponent = exponent * a + coefficient
    return torch.exp2(exponent)


def gelu(x: Tensor) -> Tensor:
    """Return x Phi(x) of float32 x.

    It uses `where` rather than clamp and relu, which spend instructions on NaN; the tail propagates NaN already.
    """
    a = x.abs()
    return torch.where(x > 0, x, 0.0) - torch.where(a < FAR, a, FAR) * tail(a)


def slope(x: Tensor) -> Tensor:
    """Return gelu'(x) = Phi(x) + x phi(x) of float32 x."""
    a, below = x.abs(), tail(x.abs())
    density = torch.exp2(x * x * LOG2_DENSITY[1] + LOG2_DENSITY[0])
    return torch.where(x < 0, below, 1 - below) + torch.where(a < FAR, x, 0.0) * density


class GeluFunction(torch.autograd.Function):
    """gelu of any floating-point dtype, computed in float32; only the input is saved for the backward pass."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return gelu(x.float()).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        return (gradient.float() * slope(x.float())).to(x.dtype)


class Gelu(nn.Module):
    """nn.GELU that uses GeluFunction where it is compiled for a GPU and x has 16 bits.

    Elsewhere GeluFunction would be thirty kernels (eager), 1.2 times slower (compiled on a CPU) or inexact (float32).
    """

    def forward(self, x: Tensor) -> Tensor:
        short = torch.compiler.is_compiling() and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
        y: Tensor = GeluFunction.apply(x) if short else F.gelu(x)
        return y

"""bf16 copies of the blocks' linear layers, cast once per step instead of in every block.

Under autocast each compiled block casts its own float32 weights and biases, in one small kernel each, eight per block.
Copies are made of all blocks' layers by one fused operator, and are not saved for the backward pass block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COPIES = "bf16_copies"
"""Attribute of a layer while its copies are in use: (weight, bias)."""


class Bf16Weights:
    """bf16 copies of the parameters of linear layers, which have biases."""

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        self._layers = list(layers)
        self._parameters = [p.detach() for layer in self._layers for p in (layer.weight, layer.bias)]
        self.tensors = [torch.empty_like(p, dtype=torch.bfloat16) for p in self._parameters]
        """The copies: weight and bias of each layer."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Refresh the copies and use them in this context, which spans forward and backward pass."""
        if self.tensors:
            torch._foreach_copy_(self.tensors, self._parameters)
        pairs = zip(self.tensors[::2], self.tensors[1::2], strict=True)
        for layer, pair in zip(self._layers, pairs, strict=True):
            setattr(layer, COPIES, pair)
        try:
            yield
        finally:
            for layer in self._layers:
                delattr(layer, COPIES)


def copies(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return a layer's weight and bias in bf16, without gradient: the copies in use, or newly cast ones."""
    pair: tuple[Tensor, Tensor] | None = getattr(layer, COPIES, None)
    if pair is not None:
        return pair
    return layer.weight.detach().bfloat16(), None if layer.bias is None else layer.bias.detach().bfloat16()


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer: with its copies where they are in use and nothing needs a gradient, else as it is."""
    pair = getattr(layer, COPIES, None)
    if pair is None or torch.is_grad_enabled():
        y: Tensor = layer(x)
        return y
    return F.linear(x, *pair)


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight's gradient [o, i] of a product, from grad [t, o] and x [t, i] in bf16.

    On a GPU the product writes float32 itself; a bf16 result would be rounded and then cast by another kernel.
    """
    if dtype == torch.float32 and grad.is_cuda:
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return (grad.t() @ x).to(dtype)


class Product(torch.autograd.Function):
    """Product x W' in bf16, x [..., i] and weight [o, i] of any floating type → [..., o]; copy: the weight in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        narrow = x.bfloat16()
        ctx.save_for_backward(narrow, copy)
        ctx.kinds = x.dtype, weight.dtype
        return F.linear(narrow, copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (x, copy), (of_x, of_weight) = gradients, ctx.saved_tensors, ctx.kinds
        grad_weight = weight_gradient(grad.flatten(0, -2), x.flatten(0, -2), of_weight)
        return (grad @ copy).to(of_x), grad_weight, None


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer without its bias, in bf16."""
    y: Tensor = Product.apply(x, layer.weight, copies(layer)[0])
    return y

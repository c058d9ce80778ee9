"""bf16 copies of linear layers: used and refreshed in their context only, with the gradients of the parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm.kernels.bf16_weights import Bf16Weights, copies, linear, product


def _layers() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(16, 24), nn.Linear(24, 8)]


def test_products_and_gradients_are_those_of_autocast() -> None:
    layers, x = _layers(), torch.randn(2, 5, 16).requires_grad_()

    def run(copied: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = x
            for layer in layers:
                y = product(layer, y) if copied else F.linear(y, layer.weight)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *(layer.weight for layer in layers)])]

    expected = run(copied=False)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(run(copied=True), expected, strict=True))
    with Bf16Weights(layers).in_use():
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(run(copied=True), expected, strict=True))


def test_a_context_sees_the_parameters_as_they_are_when_it_begins() -> None:
    layers = _layers()
    weights = Bf16Weights(layers)
    x = torch.randn(5, 16)
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layers[0].weight.mul_(-2)
            layers[0].bias.add_(1)
            expected = layers[0](x)
            with weights.in_use():
                weight, bias = copies(layers[0])
                assert copies(layers[0])[0] is weight, "not cast again"
                assert torch.equal(linear(layers[0], x), expected)
            layers[0].weight.mul_(2)
            assert torch.equal(bias, layers[0].bias.bfloat16())
            assert torch.equal(2 * weight, layers[0].weight.bfloat16())


def test_outside_the_context_the_parameters_themselves_are_used() -> None:
    layers, x = _layers(), torch.randn(5, 16)
    try:
        with Bf16Weights(layers).in_use():
            raise KeyError
    except KeyError:
        pass
    with torch.no_grad():
        layers[0].weight.mul_(3)
        assert torch.equal(linear(layers[0], x), layers[0](x))
    assert torch.equal(copies(layers[0])[0], layers[0].weight.bfloat16())
    with Bf16Weights([]).in_use():
        assert copies(layers[0])[0] is not copies(layers[0])[0]

"""GELU for 16-bit activations against float64, over every bfloat16."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iwm.kernels.gelu import Gelu, GeluFunction, gelu, slope

EAGER: Callable[[Tensor], Tensor] = GeluFunction.apply


@pytest.fixture(scope="module")
def compiled() -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: GeluFunction.apply(x), fullgraph=True, dynamic=False)


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return GELU and its derivative in float64; erfc keeps the negative tail exact."""
    x = x.double()
    cumulative = torch.special.erfc(-x / 2**0.5) / 2
    return x * cumulative, cumulative + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5


def every_bfloat16() -> Tensor:
    """Return the 65,280 finite bfloat16 values."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return x[x.isfinite()]


def units(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of bfloat16 values in units in the last place, where -0 equals 0."""
    a, b = (v.view(torch.int16).int() for v in (a, b))
    return (torch.where(a < 0, -(2**15) - a, a) - torch.where(b < 0, -(2**15) - b, b)).abs()


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_every_bfloat16_gives_the_nearest_or_its_neighbour(how: str, compiled: Callable[[Tensor], Tensor]) -> None:
    x = every_bfloat16().requires_grad_()
    y = (compiled if how == "compiled" else EAGER)(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(x))
    x, y = x.detach(), y.detach()
    want, derivative = exact(x)
    off = units(y, want.bfloat16())
    assert y.dtype == dx.dtype == torch.bfloat16
    assert off[x >= -9].max() <= 1
    assert (off > 0).sum() < 250  # 197 with a perfect erf
    assert y[x < -9].abs().max() < 1e-17
    assert ((dx.double() - derivative).abs() <= derivative.abs() * 2**-8 + 1e-6).all()
    assert units(dx, derivative.bfloat16())[derivative.abs() > 1e-3].max() <= 1


def test_errors_in_float32() -> None:
    x = torch.linspace(-12, 12, 240_001)
    want, derivative = exact(x)
    error = (gelu(x).double() - want).abs()
    assert error.max() < 4e-7
    assert (slope(x).double() - derivative).abs().max() < 6e-7
    near = (x > -4) & (x < 0)
    assert (error[near] / want[near].abs()).max() < 3e-6


def test_limits_and_nan() -> None:
    big = torch.finfo(torch.float32).max
    x = torch.tensor([float("inf"), big, 1e5, 20.0, -float("inf"), -big, -1e5, -20.0, 0.0, -0.0])
    assert torch.equal(gelu(x), torch.tensor([float("inf"), big, 1e5, 20.0, 0, 0, 0, 0, 0, 0]))
    assert torch.equal(slope(x)[:8], torch.tensor([1.0] * 4 + [0.0] * 4))
    assert gelu(torch.tensor(float("nan"))).isnan()
    assert slope(torch.tensor(float("nan"))).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_autograds(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(64, 1001, generator=generator)).to(dtype).requires_grad_()
    gradient = torch.randn(64, 1001, generator=generator).to(dtype)
    wide = x.detach().double().requires_grad_()
    y, y64 = EAGER(x), F.gelu(wide)
    (dx,), (dx64,) = torch.autograd.grad(y, x, gradient), torch.autograd.grad(y64, wide, gradient.double())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), y64, rtol=unit, atol=1e-6)
    torch.testing.assert_close(dx.double(), dx64, rtol=unit, atol=3e-6)


def test_the_module_is_torchs_where_it_is_not_compiled_for_a_gpu() -> None:
    x = torch.linspace(-6, 6, 1001)
    assert torch.equal(Gelu()(x.bfloat16()), F.gelu(x.bfloat16()))
    assert not list(Gelu().state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable GPU here: elsewhere the module is torch's")
def test_compiled_for_a_gpu_the_module_is_that_function() -> None:
    x = every_bfloat16().cuda()
    y = torch.compile(Gelu(), fullgraph=True, dynamic=False)(x).cpu()
    want = exact(x.cpu())[0].bfloat16()
    assert units(y, want)[x.cpu() >= -9].max() <= 1

"""Fused backward pass of the MLP, interpreted on a CPU, against autograd in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.interpreted import DEVICE, assert_norm_close

# isort: split
import timm.layers
from timm.models.vision_transformer import Block, VisionTransformer

from iwm.kernels import gelu, mlp
from iwm.kernels.gelu import Gelu
from iwm.kernels.mlp import LinearGelu, Mlp, MlpTiling, gelu_backward_bias


def _fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the GPU's code path here, with few programs because the interpreter is slow."""
    monkeypatch.setattr(Mlp, "fuses", lambda self, x: torch.is_grad_enabled())
    monkeypatch.setattr(mlp, "TILING", MlpTiling(16, 128, 4, 2, 8))


@pytest.mark.parametrize("dim", [40, 128, 384])
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("config", [mlp.TILING._replace(programs=12), MlpTiling(16, 128, 4, 1, 6)])
def test_kernel(tokens: int, dim: int, config: MlpTiling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare every element and sum, for ways with several steps, one or none, and for partial blocks."""
    monkeypatch.setattr(mlp, "TILING", config)
    torch.manual_seed(0)
    x, grad_out = (torch.randn(tokens, dim, device=DEVICE).mul(scale).bfloat16() for scale in (3, 1))
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(exact), exact, grad_out.double())
    grad, sums = gelu_backward_bias(grad_out, x)
    assert (grad.dtype, sums.dtype, sums.shape[1]) == (torch.bfloat16, torch.float32, dim)
    torch.testing.assert_close(grad.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(sums.double().sum(0), expected.sum(0), rtol=1e-5, atol=1e-5)


def test_slope_of_every_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the kernel's slope with gelu.slope, including NaN and infinities, by sums over a single token."""
    monkeypatch.setattr(mlp, "TILING", MlpTiling(1, 8192, 4, 1, 8))
    x = torch.arange(2**16, device=DEVICE).to(torch.uint16).view(torch.bfloat16)[None]
    grad, sums = gelu_backward_bias(torch.ones_like(x), x)
    expected = gelu.slope(x.float())
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=2e-7, equal_nan=True)
    torch.testing.assert_close(grad.float(), expected, rtol=2**-7, atol=2e-7, equal_nan=True)


@pytest.mark.parametrize("rows", [(50,), (1, 50), (2, 25)])
def test_gradients(rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the gradients of input, weight and bias, in float32 like them, for rows of any shape."""
    monkeypatch.setattr(mlp, "TILING", MlpTiling(16, 128, 4, 2, 8))
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, device=DEVICE) for shape in ((*rows, 24), (200, 24), (200,))]
    ours = [value.clone().requires_grad_() for value in inputs]
    exact = [value.double().requires_grad_() for value in inputs]
    grad_out = torch.randn(*rows, 200, device=DEVICE).bfloat16()
    narrow = [value.bfloat16() for value in inputs[1:]]
    y, expected = LinearGelu.apply(*ours, *narrow), F.gelu(F.linear(*exact))
    assert_norm_close(y, expected, 1e-2)
    grads, expected_grads = (
        torch.autograd.grad(y, ours, grad_out),
        torch.autograd.grad(expected, exact, grad_out.double()),
    )
    for grad, value, expected_grad in zip(grads, inputs, expected_grads, strict=True):
        assert (grad.dtype, grad.shape) == (torch.float32, value.shape)
        assert_norm_close(grad, expected_grad, 1e-2)


def test_operator_is_registered_soundly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "TILING", MlpTiling(16, 128, 4, 2, 8))
    x = torch.randn(20, 40, device=DEVICE).bfloat16()
    torch.library.opcheck(gelu_backward_bias, (torch.ones_like(x), x))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [(1, 20), (2, 10)])
def test_blocks_compile_into_one_graph(
    rows: tuple[int, int], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare output and gradients of a timm block in autocast with timm's own Mlp; the kernel must have run."""
    torch.manual_seed(0)
    make = partial(Block, 32, 2, qkv_bias=True, act_layer=Gelu)
    plain, ours = make().to(DEVICE), make(mlp_layer=Mlp).to(DEVICE)
    ours.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(*rows, 32, device=DEVICE)
    _fuse(monkeypatch)
    ran: list[int] = []

    def run(block: Block, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)

    def found(block: Block, run: object) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16), torch.profiler.profile() as profiled:
            y = run(block, leaf)  # type: ignore[operator]
            y.square().mean().backward()
        ran.append(sum("gelu_backward_bias" in event.key for event in profiled.key_averages()))
        return [y.detach(), leaf.grad, *(parameter.grad for parameter in block.parameters())]

    expected = found(plain, run)
    torch._dynamo.reset()
    actual = found(ours, torch.compile(run, fullgraph=True, backend="aot_eager"))
    assert ran == [0, 1]
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert_norm_close(a, b.double(), 2e-2)


def test_it_is_timms_elsewhere() -> None:
    """Without fusion outputs are bit-identical to timm's, parameters have its names, and timm's ViT accepts it."""
    torch.manual_seed(0)
    make = partial(VisionTransformer, img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2, act_layer=Gelu)
    plain, ours = make(), make(mlp_layer=Mlp)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert list(Mlp(8, 16).state_dict()) == list(timm.layers.Mlp(8, 16).state_dict())
    ours.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(ours(images), plain(images))

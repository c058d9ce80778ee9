"""Fused backward pass of norm, residual stream and branch bias, interpreted on a CPU, against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.kernels.interpreted import DEVICE, CountedKernel, assert_norm_close

# isort: split
from timm.models.vision_transformer import Block as TimmBlock

from iwm.kernels import mlp, residual_norm, residual_norm_triton
from iwm.kernels.bf16_weights import Bf16Weights
from iwm.kernels.mlp import Mlp, MlpTiling
from iwm.kernels.residual_norm import NormTiling, residual_norm_backward
from iwm.models.block import OWN_LAYERS, Block

FEW = NormTiling(256, 4, 1, 3)
"""Few programs, because the interpreter is slow."""


@pytest.mark.parametrize("dim", [24, 384])
@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize(
    ("kind", "tiling"),
    [(torch.bfloat16, FEW), (torch.float32, FEW), (torch.bfloat16, NormTiling(1024, 4, 1, 2))],
)
def test_kernel(kind: torch.dtype, tokens: int, dim: int, tiling: NormTiling, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare gradient and sums, for programs with several steps, one or none, partial tiles and both streams."""
    monkeypatch.setattr(residual_norm, "TILING", tiling)
    torch.manual_seed(0)
    x = (torch.randn(tokens, dim, device=DEVICE) * 2 + 0.5).to(kind)
    grad_residual = torch.randn(tokens, dim, device=DEVICE).to(kind)
    grad_y = torch.randn(tokens, dim, device=DEVICE).bfloat16()
    weight, bias = torch.randn(2, dim, device=DEVICE)
    exact = [value.double().requires_grad_() for value in (x, weight, bias)]
    y = F.layer_norm(exact[0], (dim,), exact[1], exact[2], 1e-6)
    expected = torch.autograd.grad((y * grad_y.double()).sum() + (exact[0] * grad_residual.double()).sum(), exact)
    _, mean, rstd = torch.native_layer_norm(x.float(), (dim,), None, None, 1e-6)
    grad, sums = residual_norm_backward(grad_residual, grad_y, x, mean.flatten(), rstd.flatten(), weight)
    assert (grad.dtype, sums.dtype, sums.shape) == (kind, torch.float32, (tiling.programs, 3, dim))
    rounding = 2**-8 if kind == torch.bfloat16 else 1e-4
    torch.testing.assert_close(grad.double(), expected[0], rtol=rounding, atol=1e-5)
    for ours, reference in zip(sums.double().sum(0), (*expected[1:], grad_residual.double().sum(0)), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_operator_is_registered_soundly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_norm, "TILING", FEW)
    x, mean = torch.randn(20, 40, device=DEVICE).bfloat16(), torch.zeros(20, device=DEVICE)
    weight = torch.ones(40, device=DEVICE)
    torch.library.opcheck(residual_norm_backward, (torch.ones_like(x), x, x, mean, mean + 1, weight))


def _fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the GPU's code path here."""
    monkeypatch.setattr(Mlp, "fuses", lambda self, x: torch.is_grad_enabled())
    monkeypatch.setattr(mlp, "TILING", MlpTiling(16, 128, 4, 1, 8))
    monkeypatch.setattr(residual_norm, "TILING", FEW)


@pytest.mark.parametrize(("checkpointing", "copies"), [(False, False), (True, True)])
@pytest.mark.parametrize("selected", [None, [3, 0, 17, 12]])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_blocks_compile_into_one_graph(
    stream: torch.dtype, selected: list[int] | None, checkpointing: bool, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare output and gradients in bf16 with timm's block in float64; both norms must have run the kernel."""
    torch.manual_seed(0)
    plain = TimmBlock(32, 2, qkv_bias=True).to(DEVICE, torch.float64)
    for parameter in plain.parameters():  # biases and norms begin at 0 and 1
        nn.init.normal_(parameter, std=0.3)
    ours = Block(32, 2, qkv_bias=True, **OWN_LAYERS).to(DEVICE)
    ours.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 10, 32, device=DEVICE).to(stream)
    index = None if selected is None else torch.tensor(selected, device=DEVICE)
    _fuse(monkeypatch)
    kernel = CountedKernel(residual_norm_triton.backward_kernel)
    monkeypatch.setattr(residual_norm_triton, "backward_kernel", kernel)

    def run_plain(x: Tensor) -> Tensor:
        y = plain(x)
        return y if index is None else y.flatten(0, 1)[index][None]

    def run_ours(x: Tensor) -> Tensor:
        if checkpointing:
            return checkpoint(ours, x, selected=index, use_reentrant=False)
        return ours(x, selected=index)

    def found(block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
        leaf, bf16 = x.clone().requires_grad_(), x.dtype != torch.float64
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            y = run(leaf)
            (y * torch.linspace(-1, 1, y.numel(), device=DEVICE, dtype=y.dtype).view_as(y)).sum().backward()
        return [y.detach(), leaf.grad, *(parameter.grad for parameter in block.parameters())]

    expected = found(plain, run_plain, x.double())
    torch._dynamo.reset()
    layers = [layer for layer in ours.modules() if isinstance(layer, nn.Linear)]
    with Bf16Weights(layers if copies else []).in_use():
        actual = found(ours, torch.compile(run_ours, fullgraph=True, dynamic=False, backend="aot_eager"), x)
    assert kernel.launches == 2
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert_norm_close(a, b, 3e-2)
    assert [value.dtype for value in actual[:2]] == [stream, stream]
    assert {value.dtype for value in actual[2:]} == {torch.float32}

"""Kernels of short attention, interpreted on a CPU, against attention in fp32."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.interpreted import DEVICE

# isort: split
import iwm.kernels.short_attention as module
from iwm.kernels.short_attention import (
    AttentionTiling,
    ProjectedAttention,
    attend,
    attend_backward,
    projected_attention,
    short_attention,
)

WHOLE = 196 if torch.cuda.is_available() else 72
"""Length of a long sequence, shorter where kernels are interpreted (196 tokens take a second)."""


def identity_projected(qkv: Tensor, heads: int, offsets: Tensor | None, length: int) -> Tensor:
    """Run attention on already projected qkv, through an identity projection, which is exact."""
    identity = torch.eye(qkv.shape[1], device=DEVICE).bfloat16()
    attended: Tensor = ProjectedAttention.apply(qkv, identity, None, identity.clone(), None, heads, offsets, length)
    return attended


def _reference(qkv: Tensor, heads: int, lengths: list[int]) -> Tensor:
    outs = []
    for part in qkv.split(lengths):
        q, k, v = part.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        outs.append((weights @ v).transpose(0, 1).flatten(1))
    return torch.cat(outs)


def _inputs(tokens: int, heads: int, dim: int, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    qkv = (torch.randn(tokens, 3 * heads * dim, device=DEVICE) * scale).bfloat16().requires_grad_()
    return qkv, torch.randn(tokens, heads * dim, device=DEVICE).bfloat16()


def _check(qkv: Tensor, grad_out: Tensor, heads: int, lengths: list[int], offsets: Tensor | None, length: int) -> None:
    out = short_attention(qkv, heads, offsets, length)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    exact = qkv.detach().float().requires_grad_()
    expected = _reference(exact, heads, lengths)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad_out.float())
    assert out.dtype == grad.dtype == torch.bfloat16
    for ours, theirs in ((out.detach(), expected.detach()), (grad, expected_grad)):
        error = (ours.float() - theirs).norm() / theirs.norm()
        assert error < 6e-3
        torch.testing.assert_close(ours.float(), theirs, rtol=3e-2, atol=1e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("dim", [16, 24, 32, 64])
@pytest.mark.parametrize("length", [5, WHOLE])
def test_dense(dim: int, length: int) -> None:
    qkv, grad_out = _inputs(2 * length, 2, dim)
    _check(qkv, grad_out, 2, [length] * 2, None, length)


@pytest.mark.parametrize("dim", [24, 32, 64])
@pytest.mark.parametrize("lengths", [[7, 0, 40, 1], [0, 130, 17, WHOLE, 0]])
def test_packed(dim: int, lengths: list[int]) -> None:
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    qkv, grad_out = _inputs(sum(lengths), 2, dim)
    _check(qkv, grad_out, 2, lengths, offsets, max(lengths))


def test_scores_far_below_zero_stay_finite() -> None:
    """Weights of padding keys would overflow where all true scores are far below the score of a zero key."""
    qkv, grad_out = _inputs(40, 1, 32)
    with torch.no_grad():
        qkv[:, :32], qkv[:, 32:64] = 8, -8 + qkv[:, 32:64] / 8
    _check(qkv, grad_out, 1, [40], None, 40)


def test_tokens_reach_their_own_sequence_alone() -> None:
    lengths = [9, 14, 6]
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    qkv, grad_out = _inputs(sum(lengths), 2, 32)
    grad_out[9:23] = 0
    (grad,) = torch.autograd.grad(short_attention(qkv, 2, offsets, 20), qkv, grad_out)
    assert (grad[9:23] == 0).all()
    assert (grad[:9] != 0).any()
    assert (grad[23:] != 0).any()


@pytest.mark.parametrize("packed", [False, True])
def test_operator_is_registered_soundly(packed: bool) -> None:
    qkv, _ = _inputs(20, 2, 16)
    offsets = torch.tensor([0, 12, 12, 20], dtype=torch.int32, device=DEVICE) if packed else None
    torch.library.opcheck(attend, (qkv.detach(), 2, offsets, 20))


@pytest.mark.parametrize("packed", [False, True])
def test_attention_alone_is_that_of_an_identity_projection(packed: bool) -> None:
    qkv, grad_out = _inputs(20, 2, 16)
    offsets = torch.tensor([0, 12, 12, 20], dtype=torch.int32, device=DEVICE) if packed else None
    both = [attention(qkv, 2, offsets, 20 if packed else 10) for attention in (short_attention, identity_projected)]
    assert torch.equal(*both)
    gradients = [torch.autograd.grad(out, qkv, grad_out)[0] for out in both]
    assert torch.equal(*gradients)
    assert gradients[0].norm() > 0


def test_compiles_into_one_graph() -> None:
    qkv, grad_out = _inputs(20, 2, 16)
    compiled = torch.compile(lambda x: short_attention(x * 1, 2, None, 10) * 1, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(qkv), qkv, grad_out)
    (eager,) = torch.autograd.grad(short_attention(qkv, 2, None, 10), qkv, grad_out)
    assert torch.equal(grad, eager)


BACKWARD = [
    AttentionTiling(32, 128, 16, 4, 2),
    AttentionTiling(64, 64, 16, 4, 1, 168),
    AttentionTiling(64, 256, 16, 8, 3),
    AttentionTiling(16, 32, 16, 4, 1),
]


@pytest.mark.parametrize("tiling", BACKWARD)
@pytest.mark.parametrize(("lengths", "dim"), [(None, 32), ([7, 0, WHOLE, 64, 0, 1], 24)])
def test_every_division_of_the_keys(
    tiling: AttentionTiling, lengths: list[int] | None, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TILINGS, ("backward", "dense" if lengths is None else "packed", 32), tiling)
    parts = lengths or [WHOLE]
    heads = 2 if lengths is None else 1
    offsets = None if lengths is None else torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    qkv, grad_out = _inputs(sum(parts), heads, dim)
    _check(qkv, grad_out, heads, parts, offsets, WHOLE)
    _check_sums(qkv.detach(), grad_out, heads, parts, offsets, WHOLE)


def _check_sums(
    qkv: Tensor, grad_out: Tensor, heads: int, lengths: list[int], offsets: Tensor | None, length: int
) -> None:
    """Each row of the sequence is summed exactly once, within the rounding of the written gradient."""
    out, lse = attend(qkv, heads, offsets, length)
    grad, sums = attend_backward(grad_out, qkv, out, lse, heads, offsets, length)
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    expected = torch.stack([grad[a:b].double().sum(0) for a, b in pairwise(ends)]).view_as(sums)
    assert sums.dtype == torch.float32
    room = max(lengths) ** 0.5 * 2**-7 * float(grad.float().abs().max())
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=room)
    torch.testing.assert_close(sums[:, 0].double(), expected[:, 0], rtol=1e-5, atol=1e-5)  # dQ is summed as written
    assert (sums[[i for i, count in enumerate(lengths) if not count]] == 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_no_token_at_all(packed: bool) -> None:
    qkv, grad_out = _inputs(0, 2, 16)
    offsets = torch.zeros(4, dtype=torch.int32, device=DEVICE) if packed else None
    out, lse = attend(qkv.detach(), 2, offsets, 10)
    grad, sums = attend_backward(grad_out, qkv.detach(), out, lse, 2, offsets, 10)
    assert grad.shape == (0, 96)
    assert sums.shape == (3 if packed else 0, 3, 2, 16)
    assert (sums == 0).all()


def _projection(tokens: int, dim: int, biased: bool, kind: torch.dtype) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(1)
    w = 2 * dim
    projection = nn.Linear(w, 3 * w, bias=biased, device=DEVICE)
    for parameter in projection.parameters():
        nn.init.normal_(parameter, std=w**-0.5 if parameter.ndim == 2 else 1)
    x = torch.randn(tokens, w, device=DEVICE).to(kind)
    return x.requires_grad_(), projection, torch.randn(tokens, w, device=DEVICE)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, [7, 0, 130, 1, 0]])
def test_projection_and_its_gradients(biased: bool, kind: torch.dtype, lengths: list[int] | None) -> None:
    parts = lengths or [40, 40]
    offsets = None if lengths is None else torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    x, projection, grad_out = _projection(sum(parts), 32, biased, kind)
    inputs = [x, *projection.parameters()]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = projected_attention(x, projection, 2, offsets, max(parts))
    grads = torch.autograd.grad(out, inputs, grad_out.to(out.dtype))
    exact = [value.detach().double().requires_grad_() for value in inputs]
    qkv = exact[0] @ exact[1].t() + (exact[2] if biased else 0)
    expected = _reference(qkv, 2, parts)
    expected_grads = torch.autograd.grad(expected, exact, grad_out.double())
    assert out.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads] == [value.dtype for value in inputs]
    for ours_, theirs in zip((out.detach(), *grads), (expected.detach(), *expected_grads), strict=True):
        assert (ours_.double() - theirs).norm() < 2e-2 * theirs.norm()
    if biased:  # the gradient of the keys' bias is 0: it adds the same number to all scores of a query
        size = expected_grads[2].norm()
        assert grads[2][64:128].norm() < 3e-2 * size
        assert (grads[2] - expected_grads[2])[:64].norm() < 3e-2 * expected_grads[2][:64].norm()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_projection_compiles_into_one_graph(biased: bool, packed: bool) -> None:
    offsets = torch.tensor([0, 12, 12, 20], dtype=torch.int32, device=DEVICE) if packed else None
    x, projection, grad_out = _projection(20, 16, biased, torch.float32)

    def projected(x: Tensor) -> Tensor:
        return projected_attention(x * 1, projection, 2, offsets, 20 if packed else 10) * 1

    compiled = torch.compile(projected, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, projected):
        with torch.autocast(DEVICE, torch.bfloat16):
            out = function(x)
        results.append(torch.autograd.grad(out, [x, *projection.parameters()], grad_out.to(out.dtype)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("packed", [False, True])
def test_backward_operator_is_registered_soundly(packed: bool) -> None:
    qkv, grad_out = (value.detach() for value in _inputs(20, 2, 16))
    offsets = torch.tensor([0, 12, 12, 20], dtype=torch.int32, device=DEVICE) if packed else None
    out, lse = attend(qkv, 2, offsets, 20)
    torch.library.opcheck(attend_backward, (grad_out, qkv, out, lse, 2, offsets, 20))

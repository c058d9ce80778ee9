"""Choice of the attention kernel: its name is correct, and it is deterministic where required."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from iwm.models import attention
from iwm.models.attention import Attention, attention_kernel, set_attention_impl
from iwm.models.world_model import WorldModel
from iwm.packing import Packing, pack_tokens
from iwm.recipes import demo

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable GPU here")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def two_rows(length: int) -> Packing:
    return pack_tokens(torch.ones(2, length, dtype=torch.bool), None)


@pytest.mark.parametrize(("fused", "kernel"), [(False, "eager"), (True, "flash")])
def test_the_kernel_on_a_cpu_is_named(fused: bool, kernel: str) -> None:
    layer = Attention(32, num_heads=2)
    set_attention_impl(layer, fused)
    assert attention_kernel(layer, torch.zeros(2, 5, 32)) == kernel


def test_a_mask_that_no_fused_kernel_takes_is_named_as_what_runs() -> None:
    layer = Attention(32, num_heads=2)
    set_attention_impl(layer, fused=False)
    assert attention_kernel(layer, torch.zeros(1, 10, 32), two_rows(5)) == "eager"


def test_a_world_model_names_the_kernel_of_each_part_and_draws_nothing() -> None:
    model = WorldModel(demo()).setup(torch.device("cpu"), compiled=False)
    before = torch.get_rng_state()
    kernels = model.attention_kernels()
    assert kernels == {"context encoder": "eager", "target encoder": "eager", "predictor": "eager"}
    assert torch.equal(before, torch.get_rng_state())


def window(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Return the window that packed attention passes to torch, for sequences of 5 tokens."""
    asked: dict[str, Any] = {}

    def varlen(q: Tensor, *words: Any, **options: Any) -> Tensor:
        asked.update(options)
        return q

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    attention._attend_varlen(torch.zeros(10, 96), two_rows(5), heads=2, fused=True)
    chosen: tuple[int, int] = asked["window_size"]
    return chosen


def test_packed_attention_leaves_the_kernel_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "REPLANS_CUDNN_VARLEN", False)
    assert window(monkeypatch) == (-1, -1)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_packed_attention_is_not_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "REPLANS_CUDNN_VARLEN", False)
    assert window(monkeypatch) == (5, 5)


def test_packed_attention_is_not_cudnns_where_torch_replans_it_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "REPLANS_CUDNN_VARLEN", True)
    assert window(monkeypatch) == (5, 5)


@ON_GPU
@pytest.mark.usefixtures("deterministic")
def test_deterministic_packed_attention_is_flash_and_its_gradient_repeats() -> None:
    length, layer = 196, Attention(768, num_heads=12).cuda()
    set_attention_impl(layer, fused=True)
    packing = two_rows(length).to(torch.device("cuda"))
    tokens = torch.randn(1, 2 * length, 768, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        assert attention_kernel(layer, tokens, packing) == "flash"
        gradients = [torch.autograd.grad(layer(tokens, packing).float().square().sum(), tokens)[0] for _ in range(3)]
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@ON_GPU
def test_a_window_as_wide_as_the_longest_sequence_changes_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Attention(768, num_heads=12).cuda()
    set_attention_impl(layer, fused=True)
    present = torch.arange(196) < torch.tensor([[196], [101]])
    packing = pack_tokens(present, None).to(torch.device("cuda"))
    tokens, results = torch.randn(1, 297, 768, device="cuda"), []
    for flash in (False, True):
        monkeypatch.setattr(attention, "REPLANS_CUDNN_VARLEN", flash)
        with torch.autocast("cuda", torch.bfloat16):
            results.append(layer(tokens, packing).float())
    torch.testing.assert_close(results[0], results[1], atol=2e-2, rtol=2e-2)


HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU here"
)


@HOPPER
@pytest.mark.parametrize("packed", [False, True])
def test_short_sequences_by_the_projects_own_kernels_are_as_fused(packed: bool) -> None:
    layer = Attention(384, num_heads=12).cuda()
    packing = (
        pack_tokens(torch.arange(196) < torch.tensor([[196], [101]]), None).to(torch.device("cuda")) if packed else None
    )
    tokens = torch.randn(*((1, 297) if packed else (2, 196)), 384, device="cuda")
    results = []
    for short in (False, True):
        set_attention_impl(layer, fused=True, short=short)
        with torch.autocast("cuda", torch.bfloat16):
            assert (attention_kernel(layer, tokens, packing) == "triton") == short
            results.append(layer(tokens, packing).float())
    torch.testing.assert_close(results[0], results[1], atol=2e-2, rtol=2e-2)

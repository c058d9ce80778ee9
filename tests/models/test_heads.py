"""Linear and attentive heads, against torch's multi-head attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from iwm.models.heads import FINETUNE_INIT_STD, AttentiveHead, LinearHead


def tokens(batch: int = 5, count: int = 9, width: int = 24) -> Tensor:
    drawn = torch.randn(batch, count, width, generator=torch.Generator().manual_seed(1))
    return 3 * drawn + torch.linspace(-2, 2, width)


def drawn(width: int = 24, heads: int = 4, classes: int = 7) -> AttentiveHead:
    """Return a head whose parameters are all away from their initial values."""
    torch.manual_seed(0)
    head = AttentiveHead(width, heads, classes)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def as_torch_has_it(head: AttentiveHead, x: Tensor) -> Tensor:
    """Compute the context autoencoder's block with torch's multi_head_attention_forward and separate norms."""
    query = head.norm_query(head.query).expand(1, len(x), -1)
    keys, values = (norm(x).transpose(0, 1) for norm in (head.norm_keys, head.norm_values))
    width = x.shape[-1]
    pooled, _ = F.multi_head_attention_forward(
        query,
        keys,
        values,
        width,
        head.num_heads,
        None,
        torch.cat((head.to_query.bias, torch.zeros(width), head.to_values.bias)),
        None,
        None,
        False,
        0.0,
        head.proj.weight,
        head.proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=head.to_query.weight,
        k_proj_weight=head.to_keys.weight,
        v_proj_weight=head.to_values.weight,
    )
    return pooled[0]


def test_attentive_pooling_is_torchs_multi_head_attention_of_one_query() -> None:
    head, x = drawn(), tokens()
    torch.testing.assert_close(head.pool(x), as_torch_has_it(head, x), atol=1e-5, rtol=1e-4)


def test_its_gradients_are_those_of_torchs_attention() -> None:
    head = drawn()
    gradients = []
    for pool in (head.pool, lambda x: as_torch_has_it(head, x)):
        x = tokens().requires_grad_()
        head.zero_grad()
        pool(x).square().sum().backward()
        named = {name: p.grad for name, p in head.named_parameters() if not name.startswith("fc")}
        gradients.append({**named, "tokens": x.grad})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


def test_what_is_pooled_is_normed_over_the_batch_and_classified() -> None:
    head, x = drawn(), tokens()
    pooled = head.pool(x)
    normed = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), head.fc(normed), atol=1e-5, rtol=1e-4)
    for _ in range(200):
        head(x)
    running = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=True) + 1e-5).sqrt()
    torch.testing.assert_close(head.eval()(x), head.fc(running), atol=1e-5, rtol=1e-4)


def test_an_attentive_head_begins_as_the_mean_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    head, x = AttentiveHead(24, 4, 7), tokens()
    mean = head.norm_values(x).mean(1)
    torch.testing.assert_close(head.pool(x), head.proj(head.to_values(mean)), atol=1e-6, rtol=1e-4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4)
    began = {name: p.detach().clone() for name, p in head.named_parameters()}
    for _ in range(3):
        F.cross_entropy(head(x), torch.arange(5)).backward()
        optimizer.step()
    assert all((p != began[name]).any() for name, p in head.named_parameters())


def test_pooling_costs_a_small_part_of_a_plain_cross_attention() -> None:
    head = AttentiveHead(192, 3, 10)
    x = tokens(8, 196, 192)
    flops = []
    for pool in (head.pool, lambda x: as_torch_has_it(head, x)):
        with FlopCounterMode(display=False) as counter:
            pool(x)
        flops.append(counter.get_total_flops())
    assert flops[0] < flops[1] / 20


@pytest.mark.parametrize("std", [None, FINETUNE_INIT_STD])
def test_linear_heads_are_a_linear_layer_on_the_mean(std: float | None) -> None:
    torch.manual_seed(0)
    head = LinearHead(240, 50) if std is None else LinearHead(240, 50, std=std)
    x = tokens(width=240)
    expected = x.mean(1) @ head.fc.weight.T + head.fc.bias
    torch.testing.assert_close(head(x), expected)
    assert head.fc.weight.std().item() == pytest.approx(std or 0.01, rel=0.1)
    assert head.fc.bias.abs().max() == 0


def test_bfloat16_pooling_is_near() -> None:
    head, x = drawn(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head.pool(x).float()
    exact = head.pool(x)
    assert ((rounded - exact).norm() / exact.norm()) < 0.03

"""The optimiser: what is decayed, what a broken gradient does, and one state format for both kernels."""

from typing import Any

import pytest
import torch

from iwm.config import ConfigError, Optim
from iwm.models.world_model import WorldModel
from iwm.recipes import demo
from iwm.training import optim
from iwm.training.optim import (
    build_optimizer,
    load_state,
    parameter_groups,
    set_values,
    state_for_checkpoint,
    step_unless,
)

CPU = torch.device("cpu")


class ApexLike(torch.optim.Optimizer):
    """AdamW with the state layout of apex's FusedAdam: the step count in the group, only moments per parameter."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float, adam_w_mode: bool
    ) -> None:
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), t = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                if not s:
                    s["exp_avg"], s["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                s["exp_avg"].lerp_(p.grad, 1 - beta1)
                s["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (s["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
                p.sub_(group["lr"] / (1 - beta1**t) * s["exp_avg"] / denominator)


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 2))


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    for number in range(first, first + count):
        set_values(optimizer, lr=1e-2, weight_decay=0.1)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        step_unless(optimizer, torch.tensor(False))


def apex_like(model: torch.nn.Module) -> torch.optim.Optimizer:
    return ApexLike(parameter_groups(model), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1, adam_w_mode=True)


def torch_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, Optim(weight_decay=0.1), CPU)[0]


def test_biases_norms_and_tokens_are_not_decayed_and_nothing_is_left_out() -> None:
    model = WorldModel(demo())
    decayed, spared = ({id(p) for p in group["params"]} for group in parameter_groups(model))
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert id(p) not in decayed | spared
            continue
        single = name.endswith(("bias", "mask_token")) or "norm" in name
        assert (id(p) in spared) == single, name
        assert (id(p) in decayed) != single, name


def test_set_values_decays_only_what_is_decayed() -> None:
    optimizer = torch_adamw(net())
    set_values(optimizer, lr=0.5, weight_decay=0.3)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.3), (0.5, 0.0)]


@pytest.mark.parametrize("make", [torch_adamw, apex_like])
def test_a_broken_gradient_changes_neither_parameters_nor_moments(make: Any) -> None:
    model = net()
    optimizer = make(model)
    steps(model, optimizer, 0, 2)
    before = [p.clone() for p in model.parameters()]
    state = state_for_checkpoint(optimizer)["state"]
    moments = [entry["exp_avg"].clone() for entry in state.values()]
    counts = [float(entry["step"]) for entry in state.values()]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    step_unless(optimizer, torch.tensor(True))
    state = state_for_checkpoint(optimizer)["state"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, state.values(), strict=True))
    assert counts == [float(entry["step"]) for entry in state.values()]


@pytest.mark.parametrize(
    ("first", "then"), [(torch_adamw, apex_like), (apex_like, torch_adamw), (apex_like, apex_like)]
)
def test_a_run_goes_on_with_the_other_kernels(first: Any, then: Any) -> None:
    whole, cut = net(), net()
    steps(whole, torch_adamw(whole), 0, 6)
    optimizer = first(cut)
    steps(cut, optimizer, 0, 3)
    saved = state_for_checkpoint(optimizer)
    optimizer = then(cut)
    load_state(optimizer, saved)
    steps(cut, optimizer, 3, 3)
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_state_of_another_model_is_refused() -> None:
    saved = state_for_checkpoint(torch_adamw(torch.nn.Linear(3, 3)))
    with pytest.raises(ConfigError, match="other parameter groups"):
        load_state(torch_adamw(net()), saved)


def test_asking_for_apex_where_it_is_not_says_how_to_get_it() -> None:
    with pytest.raises(ConfigError, match=r"optim\.kernels apex.*APEX_CUDA_EXT"):
        build_optimizer(net(), Optim(kernels="apex"), CPU)


def test_auto_takes_apex_on_a_gpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "apex_fused_adam", lambda: ApexLike)
    assert build_optimizer(net(), Optim(), torch.device("cuda"))[1] == "apex FusedAdam"
    assert build_optimizer(net(), Optim(), CPU)[1] == "torch fused AdamW"
    assert build_optimizer(net(), Optim(kernels="torch"), torch.device("cuda"))[1] == "torch fused AdamW"

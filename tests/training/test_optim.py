"""Optimiser: weight decay groups, skipped steps, and one state format for both kernels."""

from typing import Any

import pytest
import torch

from iwm.config import ConfigError
from iwm.models.world_model import WorldModel
from iwm.recipes import demo
from iwm.train_config import OptimConfig
from iwm.training import optim
from iwm.training.optim import (
    build_optimizer,
    capturable,
    load_optimizer_state,
    optimizer_state_dict,
    param_groups,
    set_lr_wd,
    step_if_finite,
)

CPU = torch.device("cpu")


def fused_adam(
    chunk: int,
    skip: torch.Tensor,
    lists: list[list[torch.Tensor]],
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: torch.Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inverse_scale: torch.Tensor,
) -> None:
    """CPU implementation of apex's kernel multi_tensor_adam_capturable; mode 1 is AdamW."""
    assert mode == bias_correction == 1
    assert inverse_scale.item() == 1
    if skip.item():
        return
    for gradient, p, m, v in zip(*lists, strict=True):
        p.mul_(1 - lr * weight_decay)
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        t = step.item()
        p.sub_(lr / (1 - beta1**t) * m / ((v / (1 - beta2**t)).sqrt() + eps))


class ApexLike(torch.optim.Optimizer):
    """CPU stand-in for apex's capturable FusedAdam, with its arguments, state, and order of counting and skipping."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        adam_w_mode: bool,
        capturable: bool,
    ) -> None:
        assert adam_w_mode
        assert capturable
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": 1e-8, "weight_decay": weight_decay})
        for group in self.param_groups:
            group["lr"] = group["lr"].clone()
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int)

    def zero_grad(self) -> None:  # as in apex, without an argument
        super().zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            else:
                group["step"] = torch.ones(1, dtype=torch.int)
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[CPU])
            lists = [
                [p.grad for p in trained],
                trained,
                *([self.state[p][name] for p in trained] for name in ("exp_avg", "exp_avg_sq")),
            ]
            fused_adam(
                0, self._dummy_overflow_buf, lists, group["lr"], *group["betas"], group["eps"], group["step"], 1, 1,
                group["weight_decay"], grad_scaler._get_scale_async().double().reciprocal().float(),
            )  # fmt: skip


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 2))


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    for number in range(first, first + count):
        set_lr_wd(optimizer, lr=1e-2, weight_decay=0.1)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        step_if_finite(optimizer, torch.tensor(False))


def apex_like(model: torch.nn.Module) -> torch.optim.Optimizer:
    return capturable(ApexLike, param_groups(model), OptimConfig(weight_decay=0.1))


def real_apex(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Build apex's real class with its kernel replaced by the CPU implementation; skip the test without apex."""
    fused = optim.apex_fused_adam()
    if fused is None:
        pytest.skip("apex with CUDA kernels is not installed")
    tensor = torch.tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", lambda *words, **options: tensor(*words, **{**options, "device": None}))
        optimizer = capturable(fused, param_groups(model), OptimConfig(weight_decay=0.1))
    optimizer.multi_tensor_adam_capturable = lambda *words: torch.no_grad()(fused_adam)(*words)
    return optimizer


def torch_adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, OptimConfig(weight_decay=0.1), CPU)[0]


def test_biases_norms_and_tokens_are_not_decayed_and_nothing_is_left_out() -> None:
    model = WorldModel(demo())
    decayed, spared = ({id(p) for p in group["params"]} for group in param_groups(model))
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert id(p) not in decayed | spared
            continue
        single = name.endswith(("bias", "mask_token")) or "norm" in name
        assert (id(p) in spared) == single, name
        assert (id(p) in decayed) != single, name


def test_set_lr_wd_changes_only_decayed_groups() -> None:
    optimizer = torch_adamw(net())
    set_lr_wd(optimizer, lr=0.5, weight_decay=0.3)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.3), (0.5, 0.0)]


@pytest.mark.parametrize("make", [torch_adamw, apex_like, real_apex])
def test_a_broken_gradient_changes_neither_parameters_nor_moments(make: Any) -> None:
    model = net()
    optimizer = make(model)
    steps(model, optimizer, 0, 2)
    before = [p.clone() for p in model.parameters()]
    state = optimizer_state_dict(optimizer)["state"]
    moments = [entry["exp_avg"].clone() for entry in state.values()]
    counts = [float(entry["step"]) for entry in state.values()]
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    step_if_finite(optimizer, torch.tensor(True))
    state = optimizer_state_dict(optimizer)["state"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, state.values(), strict=True))
    assert counts == [float(entry["step"]) for entry in state.values()]


@pytest.mark.parametrize("make", [apex_like, real_apex])
@pytest.mark.parametrize("broken", [{0}, {2}, {0, 1}, {2, 3, 5}])
def test_skipped_steps_are_not_counted_by_apex(make: Any, broken: set[int]) -> None:
    one, other = net(), net()
    plain, apex = torch_adamw(one), make(other)
    for number in range(6):
        for model, optimizer in ((one, plain), (other, apex)):
            set_lr_wd(optimizer, lr=1e-2, weight_decay=0.1)
            optimizer.zero_grad()
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
            model(x * (torch.nan if number in broken else 1)).square().mean().backward()
            step_if_finite(optimizer, torch.tensor(number in broken))
        # A run that ends after any step, even a skipped one, resumes with the same step count.
        saved = optimizer_state_dict(apex)
        assert {float(entry["step"]) for entry in saved["state"].values()} <= {
            float(number + 1 - len(broken & set(range(number + 1))))
        }
        apex = make(other)
        load_optimizer_state(apex, saved)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("first", "then"), [(torch_adamw, apex_like), (apex_like, torch_adamw), (apex_like, apex_like)]
)
def test_a_run_resumes_with_the_other_kernels(first: Any, then: Any) -> None:
    whole, cut = net(), net()
    steps(whole, torch_adamw(whole), 0, 6)
    optimizer = first(cut)
    steps(cut, optimizer, 0, 3)
    saved = optimizer_state_dict(optimizer)
    optimizer = then(cut)
    load_optimizer_state(optimizer, saved)
    steps(cut, optimizer, 3, 3)
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_state_of_another_model_is_refused() -> None:
    saved = optimizer_state_dict(torch_adamw(torch.nn.Linear(3, 3)))
    with pytest.raises(ConfigError, match="other parameter groups"):
        load_optimizer_state(torch_adamw(net()), saved)


def test_missing_apex_is_an_error_that_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"optim\.implementation apex.*APEX_CUDA_EXT"):
        build_optimizer(net(), OptimConfig(implementation="apex"), CPU)


def test_auto_takes_apex_on_a_gpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "apex_fused_adam", lambda: ApexLike)
    monkeypatch.setattr(optim, "capturable", lambda fused, groups, config: fused)
    assert build_optimizer(net(), OptimConfig(), torch.device("cuda"))[1] == "apex FusedAdam"
    assert build_optimizer(net(), OptimConfig(), CPU)[1] == "torch fused AdamW"
    assert build_optimizer(net(), OptimConfig(implementation="torch"), torch.device("cuda"))[1] == "torch fused AdamW"


APEX_ON_A_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or optim.apex_fused_adam() is None, reason="needs a GPU and apex with CUDA kernels"
)


@APEX_ON_A_GPU
def test_apex_on_a_gpu_takes_torchs_steps_and_waits_for_no_flag() -> None:
    device, broken = torch.device("cuda"), {0, 3}
    models = [torch.nn.Conv2d(3, 8, 4).to(device, memory_format=torch.channels_last) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        build_optimizer(model, OptimConfig(implementation=kernels), device)[0]
        for model, kernels in zip(models, ("torch", "apex"), strict=True)
    ]
    for number in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            x = torch.full((2, 3, 8, 8), torch.nan if number in broken else 0.1 * (number + 1), device=device)
            model(x).square().mean().backward()
            flag = torch.tensor(number in broken, device=device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                set_lr_wd(optimizer, lr=1e-2, weight_decay=0.1)
                step_if_finite(optimizer, flag)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert {float(entry["step"]) for entry in optimizer_state_dict(optimizers[1])["state"].values()} == {4.0}


@APEX_ON_A_GPU
def test_100_steps_of_apex_on_a_gpu_end_where_torchs_do() -> None:
    """Use all trained parameters of a world model, with new gradients, learning rate and weight decay at each step."""
    device = torch.device("cuda")
    parameters, optimizers = [], []
    for kernels in ("torch", "apex"):
        torch.manual_seed(0)
        model = WorldModel(demo()).setup(device, compiled=False)
        parameters.append([p for p in model.parameters() if p.requires_grad])
        optimizers.append(build_optimizer(model, OptimConfig(implementation=kernels), device)[0])
    start = [p.detach().clone() for p in parameters[0]]
    generator = torch.Generator(device).manual_seed(0)
    for step in range(100):
        for one, other in zip(*parameters, strict=True):
            one.grad = torch.empty_like(one).normal_(std=1e-3, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            set_lr_wd(optimizer, lr=1e-3 * min(1.0, step / 20), weight_decay=0.04 + 0.0036 * step)
            step_if_finite(optimizer, torch.zeros((), dtype=torch.bool, device=device))
    for one, other, before in zip(*parameters, start, strict=True):
        assert (one - before).norm() > 0
        assert (one - other).norm() <= 1e-5 * (one - before).norm()

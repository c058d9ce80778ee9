"""Optimisers follow their published formulas, with the learning rates and decays of the recipes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars, param_groups_layer_decay
from torch import Tensor, nn

from iwm.config import Config
from iwm.downstream import experiment
from iwm.downstream.optim import adamw, lars, layer_decay_scales, set_lr
from iwm.downstream.progress import TrainPlan
from iwm.downstream.trials import FinetunedEncoder
from iwm.models.backbone import frozen_backbone
from iwm.models.external.loading import ExternalEncoder
from iwm.models.heads import LinearHead
from iwm.models.world_model import WorldModel

STEPS = 6


def gradients(module: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in module.parameters()]


def trajectory(module: nn.Module, step_of: Callable[[int, list[Tensor]], None]) -> list[Tensor]:
    """Return the parameters after STEPS steps whose gradients depend only on the step."""
    for step in range(STEPS):
        step_of(step, gradients(module, step))
    return [p.detach().clone() for p in module.parameters()]


def optimise(module: nn.Module, optimizer: torch.optim.Optimizer, share: Callable[[int], float]) -> list[Tensor]:
    def step_of(step: int, given: list[Tensor]) -> None:
        set_lr(optimizer, share(step))
        for parameter, gradient in zip(module.parameters(), given, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return trajectory(module, step_of)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 10)


def maes_lars(module: nn.Module, rate: Callable[[int], float], weight_decay: float, momentum: float) -> list[Tensor]:
    """Compute MAE's LARS (util/lars.py) explicitly: parameters of one dimension are neither scaled nor decayed."""
    velocities = [torch.zeros_like(p) for p in module.parameters()]

    def step_of(step: int, given: list[Tensor]) -> None:
        for parameter, velocity, gradient in zip(module.parameters(), velocities, given, strict=True):
            update = gradient
            if parameter.ndim > 1:
                update = gradient + weight_decay * parameter.data
                update = update * 0.001 * parameter.data.norm() / update.norm()
            velocity.mul_(momentum).add_(update)
            parameter.data -= rate(step) * velocity

    return trajectory(module, step_of)


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 4)


def test_lars_takes_the_steps_of_maes_formula_through_a_warm_up() -> None:
    one, other = linear(), linear()
    got = optimise(one, lars(one, 6.4, 0.0), warm_up)
    expected = maes_lars(other, lambda step: 6.4 * warm_up(step), 0.0, 0.9)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_lars_decays_weights_and_no_biases() -> None:
    """With a negligible gradient, only decay moves weights. (The recipe has no decay, as in MAE's formula.)"""
    module = linear()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = lars(module, 1.0, 0.1, momentum=0.0)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1e-12)
    optimizer.step()
    weight, bias = module.weight.detach(), module.bias.detach()
    torch.testing.assert_close(weight, before[0] * (1 - 0.001), rtol=1e-5, atol=0)
    torch.testing.assert_close(bias, before[1], rtol=0, atol=1e-11)


def test_timms_default_without_weight_decay_is_plain_sgd_and_steps_many_times_too_far() -> None:
    """The claim in the docstring of optim.lars, for a new probe on ViT-B features and 1,000 classes."""
    torch.manual_seed(0)
    head = LinearHead(768, 1000)
    labels = torch.randint(0, 1000, (4096,))
    features = torch.randn(1000, 768)[labels] + torch.randn(4096, 768) + torch.randn(768)
    F.cross_entropy(head(0.5 * features[:, None]), labels).backward()
    weight, steps = head.fc.weight, []
    assert weight.grad is not None
    begin, gradient = weight.detach().clone(), weight.grad.clone()
    for optimizer in (lars(head, 1.0, 0.0, momentum=0.0), Lars(head.parameters(), lr=1.0)):
        optimizer.step()
        steps.append(weight.detach() - begin)
        weight.data.copy_(begin)
        weight.grad.copy_(gradient)  # some releases of timm scale it in place
    torch.testing.assert_close(steps[1], -gradient)
    assert steps[0].norm() == pytest.approx((0.001 * begin.norm()).item(), rel=1e-4)
    assert 20 < steps[1].norm() / steps[0].norm() < 200


def test_a_finetuned_timm_vit_has_timms_groups_but_for_its_last_norm() -> None:
    """Rates per layer and decayed parameters are as in BEiT and MAE, which count the last norm with the head."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    stock = VisionTransformer(**size, num_classes=10)
    stock_names = {parameter: name for name, parameter in stock.named_parameters()}
    groups = param_groups_layer_decay(
        stock, weight_decay=0.05, layer_decay=0.65, no_weight_decay_list=stock.no_weight_decay()
    )
    expected = {
        stock_names[parameter]: (2e-3 * group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    expected |= dict.fromkeys(("norm.weight", "norm.bias"), (0.002, 0.0))
    encoder = ExternalEncoder("timm", VisionTransformer(**size, num_classes=0), (0.5,) * 3, (0.5,) * 3)
    trial = FinetunedEncoder(frozen_backbone(encoder).finetune_copy(), LinearHead(32, 10))
    optimizer = adamw(trial, 2e-3, 0.05, layer_decay_scales(trial, 0.65).__getitem__)
    got = {
        name.removeprefix("backbone.encoder.vit.").replace("head.fc", "head"): values
        for name, values in rates_and_decays(trial, optimizer).items()
    }
    assert got.keys() == expected.keys()
    for name, values in got.items():
        assert values == pytest.approx(expected[name]), name


def test_adamw_takes_the_steps_of_its_formula_on_every_parameter(small: Config) -> None:
    """Loshchilov and Hutter's, written out, with each parameter's own rate and decay, through a warm-up."""
    torch.manual_seed(0)
    backbone = frozen_backbone(WorldModel(small).target_encoder)
    one = FinetunedEncoder(backbone.finetune_copy(), LinearHead(backbone.embed_dim, 5))
    other = copy.deepcopy(one)
    trained = nn.ParameterList(p for p in one.parameters() if p.requires_grad)
    optimizer = adamw(one, 2e-3, 0.3, layer_decay_scales(one, 0.65).__getitem__)
    got = optimise(trained, optimizer, warm_up)

    own = nn.ParameterList(p for p in other.parameters() if p.requires_grad)
    values = list(rates_and_decays(one, optimizer).values())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in own]

    def step_of(step: int, given: list[Tensor]) -> None:
        for parameter, (first, second), (peak, decay), gradient in zip(own, moments, values, given, strict=True):
            rate = peak * warm_up(step)
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            parameter.data *= 1 - rate * decay
            unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            parameter.data -= rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)

    expected = trajectory(own, step_of)
    assert len({peak for peak, _ in values}) == 6
    assert {decay for _, decay in values} == {0.0, 0.3}
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def rates_and_decays(trial: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Return the peak learning rate and weight decay of every trained parameter by its name."""
    values = {p: (group["peak"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    named = {name: values[p] for name, p in trial.named_parameters() if p in values}
    assert len(named) == len(values) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert set(named) == {name for name, p in trial.named_parameters() if p.requires_grad}
    return named


# Rates of trials of a model with 4 encoder and 4 predictor blocks: the first matching name prefix counts.

Rates = dict[str, float]
HEAD = {"head.": 1.0}
ENCODER: Rates = {
    "backbone.encoder.patch_embed.": 0.65**5,
    **{f"backbone.encoder.blocks.{block}.": 0.65 ** (4 - block) for block in range(4)},
    "backbone.encoder.norm.": 1.0,
    **HEAD,
}
END_TO_END: Rates = {
    "backbone.encoder.patch_embed.": 0.1 * 0.9**10,
    **{f"backbone.encoder.blocks.{block}.": 0.1 * 0.9 ** (9 - block) for block in range(4)},
    "backbone.encoder.norm.": 0.1 * 0.9**5,
    **{f"predictor_backbone.predictor.blocks.{block}.": 0.1 * 0.9 ** (4 - block) for block in range(4)},
    **{f"predictor_backbone.predictor.{name}.": 0.1 for name in ("norm", "predictor_proj")},
    "predictor_backbone.predictor.": 0.1 * 0.9**5,
    **HEAD,
}
OF_RANDOM: Rates = {
    name: value * (10 if name.startswith("predictor_backbone") else 1) for name, value in END_TO_END.items()
}
PRETRAINED, RANDOM = ({"predictor_backbone.predictor.": share, **HEAD} for share in (0.1, 1.0))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("linear", {"lr": (1.6, 6.4)}, {"teacher, lr 1.6": (1.6, 0.0, HEAD), "teacher, lr 6.4": (6.4, 0.0, HEAD)}),
        ("attentive", {}, {"teacher, lr 0.0001": (1e-4, 0.01, HEAD)}),
        ("finetune-encoder", {}, {"seed 0": (2e-3, 0.005, ENCODER)}),
        (
            "finetune-predictor",
            {},
            {"pretrained, seed 0": (1e-3, 0.1, PRETRAINED), "random, seed 0": (1e-3, 0.1, RANDOM)},
        ),
        (
            "finetune-end-to-end",
            {"predictors": ("pretrained", "random")},
            {"pretrained, seed 0": (2e-3, 0.1, END_TO_END), "random, seed 0": (2e-3, 0.1, OF_RANDOM)},
        ),
        (
            "multitask",
            {"tasks": ("label", "side")},
            {
                "multitask": (
                    1e-3,
                    0.1,
                    {"predictor_backbone.predictor.": 0.1, "predictor_backbone.task_tokens": 1.0, "heads.": 1.0},
                ),
                "single-label": (1e-3, 0.1, PRETRAINED),
                "single-side": (1e-3, 0.1, PRETRAINED),
            },
        ),
        (
            "segmentation",
            {"lr": (2e-5,), "parts": ("encoder", "predictor", "end-to-end"), "classes": 4, "channels": 8},
            {f"{part}, lr 2e-05": (2e-5, 0.01, {"": 1.0}) for part in ("encoder", "predictor", "end-to-end")},
        ),
    ],
)
def test_rates_and_decay_reach_the_parameters_that_the_recipe_names(
    monkeypatch: pytest.MonkeyPatch,
    leverage: Callable[..., Any],
    name: str,
    options: dict[str, Any],
    expected: dict[str, tuple[float, float, Rates]],
) -> None:
    plans: list[TrainPlan] = []
    monkeypatch.setattr(experiment, "train", lambda plan, *rest: plans.append(plan))
    assert leverage(name, **options) is None
    plan = plans[0]
    assert list(plan.study.names) == list(expected)
    for trial, optimizer, (lr, decay, shares) in zip(
        plan.study.trials, plan.optimizers, expected.values(), strict=True
    ):
        unused = set(shares)
        for parameter, (peak, decayed) in rates_and_decays(trial, optimizer).items():
            part = next(part for part in shares if parameter.startswith(part))
            unused.discard(part)
            assert peak == pytest.approx(lr * shares[part]), parameter
            value = trial.get_parameter(parameter)
            is_weight = value.ndim > 1 and not parameter.endswith("bias") and value.numel() > max(value.shape)
            assert decayed == (decay if is_weight and "task_tokens" not in parameter else 0.0), parameter
        assert not unused

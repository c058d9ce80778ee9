"""A step of a downstream protocol does not make the host wait for the device; non-finite steps are skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from iwm.downstream import experiment, trainer
from iwm.downstream.cached_features import CachedFeatures
from iwm.downstream.optim import adamw, lars, set_lr
from iwm.downstream.progress import TrainPlan
from iwm.training.distributed import DistEnv
from iwm.training.metric_window import MetricWindow
from iwm.training.optim import step_if_finite
from iwm.training.step import StepResult
from tests.training.test_no_waiting import NoReads

PROTOCOLS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"lr": (1.0, 10.0)}),
    ("linear", {"cache_features": True}),
    ("attentive", {}),
    ("finetune-encoder", {}),
    ("finetune-encoder", {"activation_checkpointing": True}),
    ("finetune-predictor", {"actions": ("null", "random"), "outputs": ("image", "token")}),
    ("finetune-predictor", {"cache_features": True}),
    ("finetune-end-to-end", {}),
    ("multitask", {"tasks": ("label", "side")}),
    (
        "segmentation",
        {"classes": 4, "reduce_zero_label": False, "channels": 8, "lr": (1e-3,), "parts": ("encoder", "predictor")},
    ),
]
STEPS = 5
KINDS = {"cache_features": ", cached", "activation_checkpointing": ", checkpointing"}
NAMES = [name + "".join(word for option, word in KINDS.items() if option in options) for name, options in PROTOCOLS]


def steps_of(
    monkeypatch: pytest.MonkeyPatch, leverage: Callable[..., Any], name: str, **options: Any
) -> Callable[[], None]:
    """Return a function that takes one step of a protocol, a window of metrics, on images that are already decoded."""
    made: list[tuple[TrainPlan, DistEnv]] = []
    monkeypatch.setattr(experiment, "train", lambda plan, dist, *rest: made.append((plan, dist)))
    leverage(name, **options)
    plan, dist = made[0]
    study, taken = plan.study.train(), iter(range(STEPS))
    for task in plan.tasks:
        if not isinstance(task, CachedFeatures):
            loader = cast(Any, task)._loader
            monkeypatch.setattr(task, "_loader", iter([next(loader) for _ in range(STEPS)]))

    def step() -> None:
        for optimizer in plan.optimizers:
            set_lr(optimizer, 0.5)
            optimizer.zero_grad(set_to_none=True)
        norm_buffers = trainer._norm_buffers(study)
        window = MetricWindow(dist.device)
        losses = trainer._pass(plan, list(study.trials), next(taken), dist, window)
        window.results.append(StepResult(losses, *trainer._step(plan, norm_buffers)))
        window.end(dist, plan.batch_size)

    return step


@pytest.mark.parametrize(("name", "options"), PROTOCOLS, ids=NAMES)
def test_no_operator_of_a_downstream_step_reads_a_value_back(
    monkeypatch: pytest.MonkeyPatch, leverage: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    step = steps_of(monkeypatch, leverage, name, **options)
    step()  # masks are checked after the first
    with NoReads():
        step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch's sync debug mode watches GPUs")
@pytest.mark.parametrize(("name", "options"), PROTOCOLS, ids=NAMES)
def test_torch_sees_no_synchronisation_in_a_downstream_step_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, leverage: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    step = steps_of(monkeypatch, leverage, name, device="cuda", **options)
    for number in range(STEPS):
        torch.cuda.set_sync_debug_mode("error" if number >= 3 else "default")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return adamw(module, 1e-2, 0.1)


def still(module: nn.Module) -> torch.optim.Optimizer:
    return lars(module, 2.0, 0.1, momentum=0.0)


@pytest.mark.parametrize(
    "made", [adam, still, lambda module: lars(module, 2.0, 0.0)], ids=["AdamW", "no momentum", "LARS"]
)
def test_a_step_whose_gradient_is_not_finite_leaves_everything_as_it_was(
    made: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    """With non-finite steps in between, also the first, a training ends bit for bit as without them."""
    torch.manual_seed(0)
    clean = nn.Linear(5, 4)
    disturbed = copy.deepcopy(clean)
    generator = torch.Generator().manual_seed(1)
    good: list[list[Tensor]] = [
        [torch.randn(p.shape, generator=generator) for p in clean.parameters()] for _ in range(4)
    ]
    bad = [torch.full_like(p, value) for p, value in zip(clean.parameters(), (torch.inf, torch.nan), strict=True)]
    for module, gradients in ((clean, good), (disturbed, [bad, good[0], bad, good[1], good[2], bad, good[3]])):
        optimizer = made(module)
        for given in gradients:
            for parameter, gradient in zip(module.parameters(), given, strict=True):
                parameter.grad = gradient.clone()
            step_if_finite(optimizer, torch.tensor(given is bad))
    assert all(torch.equal(one, other) for one, other in zip(clean.parameters(), disturbed.parameters(), strict=True))
    assert all(p.isfinite().all() for p in disturbed.parameters())

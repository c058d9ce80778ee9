"""Fused AdamW, and schedules of learning rate, weight decay and EMA momentum.

The kernels are apex's or torch's. Both share one state format, so that a resumed run may change them. Schedules of
pretraining follow section A.1 and I-JEPA's code; `lr_factor` is that of downstream training (A.2).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from timm.optim import Lars
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from iwm.config import Config, ConfigError
from iwm.train_config import OptimConfig
from iwm.training.parallel import shard_like


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups, with and without weight decay (biases, norms, single tokens)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    undecayed = [p for name, p in trained if p.ndim <= 1 or name.endswith("bias")]
    decayed = [p for name, p in trained if not (p.ndim <= 1 or name.endswith("bias"))]
    return [{"params": decayed, "decay": True}, {"params": undecayed, "decay": False, "weight_decay": 0.0}]


def apex_fused_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """Return apex's FusedAdam, or None where apex lacks its CUDA kernels ('apex' on PyPI is another package)."""
    try:
        importlib.import_module("amp_C")
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError:
        return None
    fused_adam: Callable[..., torch.optim.Optimizer] = optimizers.FusedAdam
    return fused_adam


def build_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """Return the optimiser and the name of its kernels. Raises ConfigError where apex is required but unavailable."""
    groups = param_groups(model)
    sharded = any(isinstance(p, DTensor) for group in groups for p in group["params"])
    apex = apex_fused_adam() if config.implementation != "torch" and device.type == "cuda" and not sharded else None
    if config.implementation == "apex" and apex is None:
        raise ConfigError(
            "optim.implementation apex: apex with CUDA kernels is not installed (or the device is not a GPU); build "
            "it from source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or use --optim.implementation auto"
        )
    if apex is not None:
        return capturable(apex, groups, config), "apex FusedAdam"
    return torch.optim.AdamW(groups, fused=True, **_options(config)), "torch fused AdamW"


def capturable(
    fused_adam: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], config: OptimConfig
) -> torch.optim.Optimizer:
    """Build apex's FusedAdam as capturable AdamW, which reads learning rate and skip flag on the device."""
    optimizer = fused_adam(groups, adam_w_mode=True, capturable=True, **_options(config))
    for group in optimizer.param_groups:
        # Without this step count apex starts at 1, even where the first step is skipped.
        group["step"] = torch.zeros(1, dtype=torch.int, device=group["params"][0].device)
    return optimizer


def _options(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.start_lr, "betas": config.betas, "weight_decay": config.weight_decay}


def set_lr_wd(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # apex's kernel reads it on the device
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = weight_decay


class _SkipFlag:
    """Stub of torch's GradScaler for apex's capturable FusedAdam: a flag that skips the step, and a scale of 1."""

    def __init__(self, found_inf: Tensor) -> None:
        self._found_inf = found_inf

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self._found_inf.device: self._found_inf}

    def _get_scale_async(self) -> Tensor:
        return torch.ones(1, device=self._found_inf.device)


def step_if_finite(optimizer: torch.optim.Optimizer, found_inf: Bool[Tensor, ""]) -> None:
    """Update the parameters unless `found_inf` (a flag on the device) is set; the host does not wait.

    A skipped step leaves parameters, moments and step counts unchanged. The kernels of both AdamWs read the flag on the
    device. LARS steps first; the step is then undone where the flag is set.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = found_inf.float()  # type: ignore[attr-defined]  # as torch's GradScaler passes it
        optimizer.step()
    elif isinstance(optimizer, Lars):
        _step_or_restore(optimizer, found_inf)
    else:
        # apex counts a step by the previous step's flag, unless this step's flag is set before.
        optimizer._dummy_overflow_buf.copy_(found_inf)  # type: ignore[attr-defined]  # apex has no types
        optimizer.step(grad_scaler=_SkipFlag(found_inf))  # type: ignore[call-overload]  # nor has its step


@torch.no_grad()
def _step_or_restore(optimizer: torch.optim.Optimizer, found_inf: Bool[Tensor, ""]) -> None:
    moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = [p.clone() for p in moved]
    velocities = [_velocity(optimizer, p, torch.zeros_like(p)).clone() for p in moved]
    optimizer.step()
    for p, old, velocity in zip(moved, before, velocities, strict=True):
        p.copy_(torch.where(found_inf, old, p))
        now = _velocity(optimizer, p, velocity)
        now.copy_(torch.where(found_inf, velocity, now))


def _velocity(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, default: Tensor) -> Tensor:
    """Return LARS's momentum of a parameter, or `default` before the first step and without momentum."""
    velocity: Tensor = optimizer.state[parameter].get("momentum_buffer", default)
    return velocity


def optimizer_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimiser's state in the layout of torch's AdamW: moments and a step count for each parameter.

    The tensors are the optimiser's own, sharded under FSDP. Nothing is read from the device.
    """
    raw = optimizer.state_dict()
    steps = {index: group.get("step") for group in raw["param_groups"] for index in group["params"]}
    state = {}
    for index, entry in raw["state"].items():
        # apex counts per group, in one integer on the device; each parameter gets a count of its own.
        step = entry["step"] if "step" in entry else steps[index].reshape(()).to(torch.float32, copy=True)
        state[index] = {"step": step, "exp_avg": entry["exp_avg"], "exp_avg_sq": entry["exp_avg_sq"]}
    return {"state": state, "groups": [list(group["params"]) for group in raw["param_groups"]]}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load a state from `optimizer_state_dict` into either AdamW; hyperparameters stay those of this run.

    Raises ConfigError where the state belongs to another model.
    """
    current = optimizer.state_dict()
    groups = [list(group["params"]) for group in current["param_groups"]]
    if groups != saved["groups"]:
        raise ConfigError(
            "the checkpoint's optimiser has other parameter groups: it belongs to another model; use another --run-dir"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {name: _like(parameters[index], value) for name, value in entry.items()}
        for index, entry in saved["state"].items()
    }
    if not isinstance(optimizer, torch.optim.AdamW):
        counts = _step_counts(state.values())
        for group in current["param_groups"]:
            group["step"] = torch.full_like(group["step"], counts)
        for entry in state.values():
            del entry["step"]
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a moment sharded as its parameter, or in its memory format; apex's kernel reads both in memory order."""
    value = shard_like(value, parameter)
    if isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _step_counts(entries: Iterable[dict[str, Any]]) -> int:
    """Return the step count that all parameters share, because apex stores it per group.

    Raises ConfigError where parameters have different counts.
    """
    counts = {int(entry["step"]) for entry in entries}
    if len(counts) > 1:
        raise ConfigError(
            f"the checkpoint's parameters have several step counts {sorted(counts)}, but apex needs a single one; use "
            "--optim.implementation torch"
        )
    return counts.pop() if counts else 0


class ScheduleValues(NamedTuple):
    """Hyperparameters of one optimiser step."""

    lr: float
    weight_decay: float
    ema: float


@dataclass(frozen=True)
class Schedules:
    """Schedules of pretraining (A.1). They span `scale` × the run (I-JEPA's ipe_scale), so that it ends before them."""

    optim: OptimConfig
    steps: int
    """Length of the run (optimiser steps)."""
    warmup: int
    """Length of the learning rate's linear warm-up (optimiser steps)."""
    scale: float
    """Length of the schedules over that of the run."""

    def values_at(self, step: int) -> ScheduleValues:
        """Return the values of optimiser step `step`, counted from 0."""
        o, horizon = self.optim, self.steps * self.scale
        done = (step + 1) / horizon
        if step < self.warmup:
            lr = o.start_lr + (o.lr - o.start_lr) * (step + 1) / self.warmup
        else:
            lr = _cosine(o.lr, o.final_lr, (step + 1 - self.warmup) / max(1.0, horizon - self.warmup))
        return ScheduleValues(
            lr=lr,
            weight_decay=_cosine(o.weight_decay, o.final_weight_decay, done),
            ema=o.ema_momentum + (o.final_ema_momentum - o.ema_momentum) * min(1.0, done),
        )


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_schedules(config: Config, steps_per_epoch: int) -> Schedules:
    """Build the run's schedules from its configuration and the number of steps per epoch."""
    s = config.schedule
    steps = s.steps if s.steps is not None else max(1, round(s.epochs * steps_per_epoch))
    return Schedules(config.optim, steps, round(steps * s.warmup_epochs / s.epochs), s.scale)


LrShape = Literal["cosine", "linear", "constant"]


def lr_factor(step: int, steps: int, warmup: int, shape: LrShape) -> float:
    """Return the learning rate of optimiser step `step` (counted from 0) as a share of its maximum (A.2).

    The share rises linearly over `warmup` steps, from 1 / warmup at step 0, is 1 at the step after the warm-up, and
    then decays to 0 along `shape`; `constant` stays 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if shape == "linear" else 1.0

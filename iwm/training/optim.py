"""AdamW with fused kernels, apex's or torch's; one format for its state, so that a run may change kernels on resume."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from iwm.config import ConfigError, Optim
from iwm.training.parallel import divided_like, whole


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters, decayed and not: biases, norms and single tokens are not."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    spared = [p for name, p in trained if p.ndim <= 1 or name.endswith("bias")]
    decayed = [p for name, p in trained if not (p.ndim <= 1 or name.endswith("bias"))]
    return [{"params": decayed, "decay": True}, {"params": spared, "decay": False, "weight_decay": 0.0}]


def apex_fused_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """apex's FusedAdam where apex was built with its CUDA kernels, else None ('apex' on PyPI is another package)."""
    try:
        importlib.import_module("amp_C")
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError:
        return None
    fused_adam: Callable[..., torch.optim.Optimizer] = optimizers.FusedAdam
    return fused_adam


def build_optimizer(model: nn.Module, config: Optim, device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """The optimiser and the name of its kernels. Raises ConfigError where apex is asked for and cannot be had."""
    groups = parameter_groups(model)
    divided = any(isinstance(p, DTensor) for group in groups for p in group["params"])
    apex = apex_fused_adam() if config.kernels != "torch" and device.type == "cuda" and not divided else None
    if config.kernels == "apex" and apex is None:
        raise ConfigError(
            "optim.kernels apex: apex with CUDA kernels is not installed here (or the device is no GPU); build it from "
            "its source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or set --optim.kernels auto"
        )
    if apex is not None:
        return capturable(apex, groups, config), "apex FusedAdam"
    return torch.optim.AdamW(groups, fused=True, **_options(config)), "torch fused AdamW"


def capturable(
    fused_adam: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], config: Optim
) -> torch.optim.Optimizer:
    """Build apex's FusedAdam as AdamW in its capturable form, which reads learning rate and skip flag on the device."""
    optimizer = fused_adam(groups, adam_w_mode=True, capturable=True, **_options(config))
    for group in optimizer.param_groups:
        # Without a step count apex begins with 1, even where the first step is skipped.
        group["step"] = torch.zeros(1, dtype=torch.int, device=group["params"][0].device)
    return optimizer


def _options(config: Optim) -> dict[str, Any]:
    return {"lr": config.start_lr, "betas": config.betas, "weight_decay": config.weight_decay}


def set_values(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # apex's kernel reads it on the device
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = weight_decay


class _SkipFlag:
    """The part of torch's GradScaler that apex's capturable FusedAdam calls: a flag to skip the step, a scale of 1."""

    def __init__(self, broken: Tensor) -> None:
        self._broken = broken

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self._broken.device: self._broken}

    def _get_scale_async(self) -> Tensor:
        return torch.ones(1, device=self._broken.device)


def step_unless(optimizer: torch.optim.Optimizer, broken: Bool[Tensor, ""]) -> None:
    """Take a step, or skip it where `broken` is true: parameters, moments and step counts stay as they are.

    Either kernel reads the flag on the device; the host waits for nothing.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = broken.float()  # type: ignore[attr-defined]  # how torch's GradScaler hands it over
        optimizer.step()
    else:
        # apex counts the step by the flag of the step before, unless this step's is there already.
        optimizer._dummy_overflow_buf.copy_(broken)  # type: ignore[attr-defined]  # apex has no types
        optimizer.step(grad_scaler=_SkipFlag(broken))  # type: ignore[call-overload]  # nor has its step


def state_for_checkpoint(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state as torch's AdamW keeps it: a step count beside each parameter's moments."""
    raw = optimizer.state_dict()
    steps = {index: group.get("step") for group in raw["param_groups"] for index in group["params"]}
    state = {}
    for index, entry in raw["state"].items():
        step = entry["step"] if "step" in entry else torch.tensor(float(steps[index]))
        state[index] = {"step": step, "exp_avg": whole(entry["exp_avg"]), "exp_avg_sq": whole(entry["exp_avg_sq"])}
    return {"state": state, "groups": [list(group["params"]) for group in raw["param_groups"]]}


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put a state from `state_for_checkpoint` into either optimiser; hyperparameters stay those of this run."""
    current = optimizer.state_dict()
    groups = [list(group["params"]) for group in current["param_groups"]]
    if groups != saved["groups"]:
        raise ConfigError("the checkpoint's optimiser has other parameter groups: it belongs to another model")
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
    """A moment divided as its parameter is, or in its memory format: apex's kernel reads both as they lie in memory."""
    value = divided_like(value, parameter)
    if isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _step_counts(entries: Iterable[dict[str, Any]]) -> int:
    """The one step count that all parameters share: apex keeps it per group."""
    counts = {int(entry["step"]) for entry in entries}
    if len(counts) > 1:
        raise ConfigError(f"the checkpoint's parameters have several step counts {sorted(counts)}; apex needs one")
    return counts.pop() if counts else 0

"""AdamW with fused kernels, apex's or torch's; one format for its state, so that a run may change kernels on resume."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
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
    options: dict[str, Any] = {"lr": config.start_lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if apex is not None:
        return apex(groups, adam_w_mode=True, **options), "apex FusedAdam"
    return torch.optim.AdamW(groups, fused=True, **options), "torch fused AdamW"


def set_values(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = weight_decay


def step_unless(optimizer: torch.optim.Optimizer, broken: Tensor) -> None:
    """Take a step, or leave parameters and moments untouched where `broken` (a bool scalar on the device) says so.

    torch's fused kernel reads the flag on the device. apex's cannot skip by itself: there the flag is read by the host.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = broken.float()  # type: ignore[attr-defined]  # how torch's GradScaler hands it over
        optimizer.step()
    elif not broken.item():
        optimizer.step()


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
        index: {name: divided_like(value, parameters[index]) for name, value in entry.items()}
        for index, entry in saved["state"].items()
    }
    if not isinstance(optimizer, torch.optim.AdamW):
        counts = _step_counts(state.values())
        for group in current["param_groups"]:
            group["step"] = counts
        for entry in state.values():
            del entry["step"]
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def _step_counts(entries: Iterable[dict[str, Any]]) -> int:
    """The one step count that all parameters share: apex keeps it per group."""
    counts = {int(entry["step"]) for entry in entries}
    if len(counts) > 1:
        raise ConfigError(f"the checkpoint's parameters have several step counts {sorted(counts)}; apex needs one")
    return counts.pop() if counts else 0

"""Optimisers of a trial: AdamW with layer-wise learning rate decay, and LARS for linear probes (paper, A.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from iwm.config import ConfigError
from iwm.models.backbone import Backbone
from iwm.models.predictor import Predictor
from iwm.models.predictor_backbone import PredictorBackbone

POSITIONS_AND_TOKENS = ("pos_embed", "task_tokens")
"""Parameters with several dimensions that are not weights of a layer."""


def adamw(
    module: nn.Module,
    lr: float,
    weight_decay: float,
    scale_of: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """Return fused AdamW, β 0.9 and 0.999. scale_of: a parameter's factor of the learning rate, by its name.

    Biases, norms, learned positions and tokens have no weight decay, as in MAE's finetuning. `peak` of a group is its
    highest learning rate, from which set_lr computes that of a step. Raises ConfigError where nothing is trained.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scale_of(name), _no_decay(name, parameter)), []).append(parameter)
    if not groups:
        raise ConfigError("nothing is trained: every parameter is frozen")
    options: list[dict[str, Any]] = [
        {"params": parameters, "peak": lr * scale, "weight_decay": 0.0 if no_decay else weight_decay}
        for (scale, no_decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(options, lr=lr, betas=(0.9, 0.999), fused=True)


def _no_decay(name: str, parameter: nn.Parameter) -> bool:
    """Return True for a parameter of one dimension, a single token, or one of POSITIONS_AND_TOKENS."""
    own = name.rpartition(".")[2]
    return parameter.ndim <= 1 or max(parameter.shape) == parameter.numel() or own in POSITIONS_AND_TOKENS


def lars(module: nn.Module, lr: float, weight_decay: float, momentum: float = 0.9) -> torch.optim.Optimizer:
    """Return LARS as in MAE's linear probe: weights move by 0.001 × their norm × the rate, biases as in plain SGD.

    Without weight decay, timm's Lars scales only with `always_adapt`. Unscaled, the first step of a probe with 768
    features and 1,000 classes would be about fifty times too large. With weight decay (A.2 has none) timm's scale is
    |weights| / (|gradient| + decay·|weights|), as in the LARS paper, where MAE has the norm of the sum.
    """
    weights = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    biases = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": weights, "peak": lr, "always_adapt": True, "weight_decay": weight_decay},
        {"params": biases, "peak": lr, "always_adapt": False, "weight_decay": 0.0},
    ]
    return Lars([group for group in groups if group["params"]], lr=lr, momentum=momentum)


def set_lr(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set each group's learning rate to `share` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def layer_ids(module: nn.Module) -> dict[str, int]:
    """Return the layer number of every trained parameter by its name, counted as in BEiT and MAE.

    module: has at most one trained Backbone, one trained PredictorBackbone, and heads. The encoder's embedding is layer
    0, its block i is layer i + 1, and its norm and the heads are the last layer (timm counts the norm with the last
    block). End to end, the numbers continue over the predictor: the encoder's norm and everything before the
    predictor's blocks are one layer; the predictor's norm and projection and the heads are the last.
    """
    ladder: list[list[nn.Module]] = [[]]
    for kind in (Backbone, PredictorBackbone):
        for part in module.modules():
            if isinstance(part, kind) and any(p.requires_grad for p in part.parameters()):
                blocks, end = _blocks_and_end(part)
                # All parameters of the part; those of its blocks and end are overwritten by later layers.
                ladder[-1].append(part)
                ladder += [[block] for block in blocks]
                ladder.append(end)
    number_of = {p: number for number, parts in enumerate(ladder) for part in parts for p in part.parameters()}
    last = len(ladder) - 1
    return {name: number_of.get(p, last) for name, p in module.named_parameters() if p.requires_grad}


def layer_decay_scales(module: nn.Module, decay: float) -> dict[str, float]:
    """Return decay^(last layer − own layer), the learning rate factor, of every trained parameter by its name."""
    numbers = layer_ids(module)
    last = max(numbers.values(), default=0)
    return {name: decay ** (last - number) for name, number in numbers.items()}


def _blocks_and_end(part: Backbone | PredictorBackbone) -> tuple[list[nn.Module], list[nn.Module]]:
    if isinstance(part, Backbone):
        return list(part.vit.blocks), [part.vit.norm]
    predictor = part.predictor
    end: list[nn.Module] = [predictor.norm]
    return list(predictor.blocks), [*end, predictor.predictor_proj] if isinstance(predictor, Predictor) else end

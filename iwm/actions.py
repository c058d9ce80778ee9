"""The action a_{x→y}: what changes from source to target, the vector that conditions the predictor (paper, 4.1, A.1).

Layout, in order:

| entry | meaning | range |
| --- | --- | --- |
| brightness, contrast, saturation, hue | change from source to target, divided by the strength | [-2, 2] |
| source_grayscale, source_blur, source_solarize | 1 where it was applied to the source | {0, 1} |
| target_grayscale, target_blur, target_solarize | the same of the target; only if it can be destroyed | {0, 1} |

A change of nothing is all zeros. Exchanging source and target negates the first four entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dali_pipelines.augmentation import PHOTOMETRIC_FIELDS, SOURCE, TARGET, Views
from iwm.config import Action

JITTER = ("brightness", "contrast", "saturation", "hue")
DESTRUCTIVE = ("grayscale", "blur", "solarize")
_FACTORS = 3
"""The first three jitter parameters are factors, the fourth (hue) is an angle."""

assert (*JITTER, "grayscale", "blur_sigma", "solarize") == PHOTOMETRIC_FIELDS


@dataclass(frozen=True)
class ActionSpec:
    """How actions are made from params: the kind of jitter difference, its scale, and which entries there are."""

    jitter: str
    scale: tuple[float, float, float, float]
    target_flags: bool

    @property
    def entries(self) -> tuple[str, ...]:
        """Name of every entry."""
        names = (*JITTER, *(f"source_{name}" for name in DESTRUCTIVE))
        return (*names, *(f"target_{name}" for name in DESTRUCTIVE)) if self.target_flags else names

    @property
    def size(self) -> int:
        return len(self.entries)


def action_spec(action: Action, views: Views) -> ActionSpec:
    """The layout for a run. A jitter parameter that is never changed (strength 0) has scale 1: its entry stays zero."""
    scale = tuple(max(s, t) or 1.0 for s, t in zip(views.source.strengths, views.target.strengths, strict=True))
    return ActionSpec(action.jitter, (scale[0], scale[1], scale[2], scale[3]), views.target.destructive)


def action_between(
    source: Float[Tensor, "b 7"], target: Float[Tensor, "b 7"], spec: ActionSpec
) -> Float[Tensor, "b k"]:
    """Action from a source view to a target view, each given by its photometric params (PHOTOMETRIC_FIELDS order)."""
    if spec.jitter == "log_ratio":
        factors = torch.log(target[:, :_FACTORS] / source[:, :_FACTORS])
        hue = target[:, _FACTORS : len(JITTER)] - source[:, _FACTORS : len(JITTER)]
        jitter = torch.cat((factors, hue), dim=1)
    else:
        jitter = target[:, : len(JITTER)] - source[:, : len(JITTER)]
    # Divided column by column: a tensor of the scales would have to be copied to the device, which waits for it.
    scaled = torch.stack([column / scale for column, scale in zip(jitter.unbind(1), spec.scale, strict=True)], dim=1)
    parts = [scaled, (source[:, len(JITTER) :] > 0).to(jitter.dtype)]
    if spec.target_flags:
        parts.append((target[:, len(JITTER) :] > 0).to(jitter.dtype))
    return torch.cat(parts, dim=1)


def action_from_params(params: Float[Tensor, "b p"], spec: ActionSpec) -> Float[Tensor, "b k"]:
    """Action of every sample of a batch, from the params its pipeline wrote (dali_pipelines/augmentation.py PARAMS)."""
    return action_between(params[:, SOURCE], params[:, TARGET], spec)


def describe(action: Float[Tensor, "k"], spec: ActionSpec) -> str:
    """One action in words, as 'brightness +0.30, hue -18°, undo grayscale'; 'nothing' for the null action."""
    values = dict(zip(spec.entries, action.tolist(), strict=True))
    words = []
    for name, scale in zip(JITTER, spec.scale, strict=True):
        change = values[name] * scale
        if abs(change) < 5e-3:
            continue
        if name == "hue":
            words.append(f"hue {change * 360:+.0f}°")
        elif spec.jitter == "log_ratio":
            words.append(f"{name} ×{torch.tensor(change).exp().item():.2f}")
        else:
            words.append(f"{name} {change:+.2f}")
    words += [f"undo {name}" for name in DESTRUCTIVE if values[f"source_{name}"]]
    if spec.target_flags:
        words += [f"apply {name}" for name in DESTRUCTIVE if values[f"target_{name}"]]
    return ", ".join(words) or "nothing"

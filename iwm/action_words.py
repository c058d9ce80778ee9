"""Actions in words: 'brightness +0.2, undo grayscale' as the vector that the predictor is told (iwm/actions.py).

Words describe a change from a source with no jitter of its own, as people have one: `brightness=+0.2` is a view whose
brightness factor is 0.2 above the source's, `hue=+0.05` one turned by 0.05 of a turn (18°).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dali_pipelines.augmentation import IDENTITY, Photometric, Views
from iwm.actions import DESTRUCTIVE, JITTER, ActionSpec, action_between
from iwm.config import Config, ConfigError

_LEAST_FACTOR = 1 / 256
"""Where factors down to 0 are drawn, a ratio's range would have no end."""


def change_ranges(config: Config) -> dict[str, tuple[float, float]]:
    """Least and greatest change of each jitter parameter that training could draw; (0, 0): it was never changed."""
    return {name: _change_range(name, config) for name in JITTER}


def _change_range(name: str, config: Config) -> tuple[float, float]:
    (s_low, s_high), (t_low, t_high) = (_drawn(name, view) for view in (config.views.source, config.views.target))
    if config.action.jitter == "log_ratio" and name != "hue":
        return max(t_low, _LEAST_FACTOR) / s_high - 1, t_high / max(s_low, _LEAST_FACTOR) - 1
    return t_low - s_high, t_high - s_low


def _drawn(name: str, view: Photometric) -> tuple[float, float]:
    unchanged = IDENTITY[JITTER.index(name)]
    return view.jitter_range(name) if view.jitter_probability > 0 else (unchanged, unchanged)


def undoable(views: Views) -> tuple[str, ...]:
    """Destructive ops that the run's sources had, so that the predictor could learn to undo them."""
    return tuple(name for name in DESTRUCTIVE if getattr(views.source, f"{name}_probability") > 0)


def applicable(views: Views) -> tuple[str, ...]:
    """Destructive ops that the run's targets had, so that the predictor could learn to apply them."""
    return tuple(name for name in DESTRUCTIVE if getattr(views.target, f"{name}_probability") > 0)


def layout(config: Config, spec: ActionSpec) -> list[dict[str, object]]:
    """Every entry of an action: its name, the scale it was divided by, and the range it had in training."""
    entries: list[dict[str, object]] = []
    for name, scale, (low, high) in zip(JITTER, spec.scale, change_ranges(config).values(), strict=True):
        logarithm = spec.jitter == "log_ratio" and name != "hue"
        ends = [math.log1p(end) if logarithm else end for end in (low, high)]
        entries.append({"name": name, "scale": scale, "range": [round(end / scale, 6) for end in ends]})
    for name in spec.entries[len(JITTER) :]:
        view, op = name.split("_", 1)
        had = op in (undoable(config.views) if view == "source" else applicable(config.views))
        entries.append({"name": name, "scale": 1.0, "range": [0.0, float(had)]})
    return entries


def action_of(
    config: Config, spec: ActionSpec, changes: Mapping[str, float], undo: Sequence[str], apply: Sequence[str]
) -> Float[Tensor, "k"]:
    """The action of these words, on the CPU.

    undo: what the source has and the target should not; apply: what the target should have.

    Raises ConfigError for a name or a value that the run's training did not have; it says which there are.
    """
    if config.action.conditioning == "none":
        raise ConfigError("action: this model was trained with action.conditioning none, its predictor is told nothing")
    source, target = list(IDENTITY), list(IDENTITY)
    ranges = change_ranges(config)
    for name, change in changes.items():
        if name not in ranges:
            raise ConfigError(f"action: there is no '{name}'; changes are {', '.join(JITTER)}, beside undo and apply")
        low, high = ranges[name]
        if not low - 1e-6 <= change <= high + 1e-6:
            allowed = f"from {low:+.2f} to {high:+.2f}" if high > low else "0 alone: training never changed it"
            raise ConfigError(f"action: {name} {change:+g} is outside what the model was trained on, {allowed}")
        target[JITTER.index(name)] += change
    for word, names, allowed_names, view in (
        ("undo", undo, undoable(config.views), source),
        ("apply", apply, applicable(config.views), target),
    ):
        if isinstance(names, str):
            raise ConfigError(f"action: {word} is a tuple of names, as {word}=('{names}',)")
        for name in names:
            if name not in allowed_names:
                raise ConfigError(
                    f"action: this model cannot {word} '{name}'; it was trained to {word}: "
                    f"{', '.join(allowed_names) or 'nothing'}"
                )
            view[len(JITTER) + DESTRUCTIVE.index(name)] = 1.0
    return action_between(torch.tensor([source]), torch.tensor([target]), spec)[0]

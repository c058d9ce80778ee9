"""Action a_{x→y}, the vector that conditions the predictor (paper, 4.1 and A.1).

It encodes the change from source to target view. Layout, in order:

| entry | meaning | range |
| --- | --- | --- |
| brightness, contrast, saturation, hue | source to target, over the larger strength | [-2, 2]; more for `log_ratio` |
| source_grayscale, source_blur, source_solarize | 1 where the op was applied to the source | {0, 1} |
| target_grayscale, target_blur, target_solarize | 1 where applied to the target; only if targets have them | {0, 1} |

Ops that the paper lacks have entries in runs whose views may apply them: jitter (gamma, temperature, rotation) after
hue, destructive ops after solarize. The null action is all zeros. Exchanging source and target negates the jitter
entries.

Actions can also be written in words, as 'brightness +0.2, undo grayscale'. Words describe the change from a source
without jitter: `brightness=+0.2` adds 0.2 to the brightness factor, `hue=+0.05` rotates the hue by 0.05 turns (18°).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dali_pipelines.augmentations import COLUMNS, DESTRUCTIVE_OPS, IDENTITY, SOURCE, TARGET, Op, PhotometricConfig
from dali_pipelines.views import Views
from iwm.config import Config, ConfigError
from iwm.model_config import ActionConfig


@dataclass(frozen=True)
class ActionSpec:
    """Layout of a run's actions."""

    ops: tuple[Op, ...]
    """Ops that have entries, jitter first (Views.action_ops)."""
    jitter_encoding: str
    """Encoding of jitter changes, `difference` or `log_ratio` (ActionConfig)."""
    scale: tuple[float, ...]
    """Divisor of each jitter entry, above 0."""
    target_flags: bool
    """True where actions include the flags of the target's destructive ops."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the entries, in order."""
        views = ("source", "target") if self.target_flags else ("source",)
        flags = (f"{view}_{op.name}" for view in views for op in self.destructive_ops)
        return (*(op.name for op in self.jitter_ops), *flags)

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def jitter_ops(self) -> tuple[Op, ...]:
        """Ops of the first entries, one each."""
        return tuple(op for op in self.ops if op.kind == "jitter")

    @property
    def destructive_ops(self) -> tuple[Op, ...]:
        """Ops of the flags."""
        return tuple(op for op in self.ops if op.kind == "destructive")


def action_spec(action: ActionConfig, views: Views) -> ActionSpec:
    """Return the action layout of a run. A jitter parameter with strength 0 has scale 1, and its entry stays zero."""
    ops = views.action_ops
    strengths = ((getattr(view, op.name) for view in (views.source, views.target)) for op in ops if op.kind == "jitter")
    return ActionSpec(
        ops, action.jitter_encoding, tuple(max(each) or 1.0 for each in strengths), views.target.destructive
    )


def action_between(
    source: Float[Tensor, "b p"], target: Float[Tensor, "b p"], spec: ActionSpec
) -> Float[Tensor, "b k"]:
    """Compute the actions [b, k] from source to target views, given as photometric params [b, PHOTOMETRIC_FIELDS]."""
    change = target - source
    ratio = torch.log(target / source) if spec.jitter_encoding == "log_ratio" else change
    # Column by column: copying a tensor of scales or indices to the device would make the host wait.
    entries = []
    for op, scale in zip(spec.jitter_ops, spec.scale, strict=True):
        entries.append((ratio if op.is_factor else change)[:, COLUMNS[op.name]] / scale)
    for view in (source, target) if spec.target_flags else (source,):
        applied = (view > 0).to(source.dtype)
        entries += [applied[:, COLUMNS[op.name]] for op in spec.destructive_ops]
    return torch.stack(entries, dim=1)


def action_from_params(params: Float[Tensor, "b p"], spec: ActionSpec) -> Float[Tensor, "b k"]:
    """Compute the actions [b, k] of a batch from the pipeline's params [b, PARAMS] (augmentations.py)."""
    return action_between(params[:, SOURCE], params[:, TARGET], spec)


def describe_action(action: Float[Tensor, "k"], spec: ActionSpec) -> str:
    """Return one action in words, as 'brightness +0.30, hue -18°, undo grayscale'; 'nothing' for the null action."""
    values = dict(zip(spec.names, action.tolist(), strict=True))
    words = []
    for op, scale in zip(spec.jitter_ops, spec.scale, strict=True):
        change = values[op.name] * scale
        if abs(change) < 5e-3:
            continue
        if not op.is_factor:
            words.append(f"{op.name} {op.in_words(change)}")
        elif spec.jitter_encoding == "log_ratio":
            words.append(f"{op.name} {op.in_words(torch.tensor(change).exp().item())}")
        else:
            words.append(f"{op.name} {change:+.2f}")
    words += [f"undo {op.name}" for op in spec.destructive_ops if values[f"source_{op.name}"]]
    if spec.target_flags:
        words += [f"apply {op.name}" for op in spec.destructive_ops if values[f"target_{op.name}"]]
    return ", ".join(words) or "nothing"


_MIN_FACTOR = 1 / 256
"""Lower bound of factors in the ranges of ratios, which would be infinite where factors down to 0 are sampled."""


def jitter_ranges(config: Config) -> dict[str, tuple[float, float]]:
    """Return the minimum and maximum change of each jitter entry in training; (0, 0) if it never changed."""
    ops = action_spec(config.action, config.views).jitter_ops
    return {op.name: _jitter_range(op, config) for op in ops}


def _jitter_range(op: Op, config: Config) -> tuple[float, float]:
    (s_low, s_high), (t_low, t_high) = (_sampled_range(op, view) for view in (config.views.source, config.views.target))
    if config.action.jitter_encoding == "log_ratio" and op.is_factor:
        return max(t_low, _MIN_FACTOR) / s_high - 1, t_high / max(s_low, _MIN_FACTOR) - 1
    return t_low - s_high, t_high - s_low


def _sampled_range(op: Op, view: PhotometricConfig) -> tuple[float, float]:
    return view.value_range(op) if view.probability(op) > 0 else (op.identity, op.identity)


def removable_ops(views: Views) -> tuple[str, ...]:
    """Return the destructive ops of the run's source views, which the predictor could learn to undo."""
    return tuple(op.name for op in DESTRUCTIVE_OPS if views.source.probability(op) > 0)


def applicable_ops(views: Views) -> tuple[str, ...]:
    """Return the destructive ops of the run's target views, which the predictor could learn to apply."""
    return tuple(op.name for op in DESTRUCTIVE_OPS if views.target.probability(op) > 0)


def action_schema(config: Config, spec: ActionSpec) -> list[dict[str, object]]:
    """Return name, scale and training range (after division by the scale) of every entry of an action."""
    entries: list[dict[str, object]] = []
    for op, scale, (low, high) in zip(spec.jitter_ops, spec.scale, jitter_ranges(config).values(), strict=True):
        logarithm = spec.jitter_encoding == "log_ratio" and op.is_factor
        ends = [math.log1p(end) if logarithm else end for end in (low, high)]
        entries.append({"name": op.name, "scale": scale, "range": [round(end / scale, 6) for end in ends]})
    for name in spec.names[len(spec.jitter_ops) :]:
        view, flag = name.split("_", 1)
        had = flag in (removable_ops(config.views) if view == "source" else applicable_ops(config.views))
        entries.append({"name": name, "scale": 1.0, "range": [0.0, float(had)]})
    return entries


def make_action(
    config: Config, spec: ActionSpec, changes: Mapping[str, float], undo: Sequence[str], apply: Sequence[str]
) -> Float[Tensor, "k"]:
    """Build an action [k], on the CPU, from changes and ops given by name.

    changes: change of each jitter parameter; undo: destructive ops of the source that the target lacks; apply:
    destructive ops of the target.

    Raises ConfigError, which lists the valid choices, for a name or value that did not occur in the run's training.
    """
    if config.action.conditioning == "none":
        raise ConfigError("action: this model was trained with action.conditioning none and does not take actions")
    source, target = list(IDENTITY), list(IDENTITY)
    ranges = jitter_ranges(config)
    for name, change in changes.items():
        if name not in ranges:
            raise ConfigError(f"action: '{name}' does not exist; choose from {', '.join(ranges)}, undo and apply")
        low, high = ranges[name]
        if not low - 1e-6 <= change <= high + 1e-6:
            allowed = (
                f"from {low:+.2f} to {high:+.2f}" if high > low else "only 0, because it never changed in training"
            )
            raise ConfigError(f"action: {name} {change:+g} is outside the model's training range: {allowed}")
        target[COLUMNS[name]] += change
    for word, names, allowed_names, view in (
        ("undo", undo, removable_ops(config.views), source),
        ("apply", apply, applicable_ops(config.views), target),
    ):
        if isinstance(names, str):
            raise ConfigError(f"action: {word} must be a tuple of names, as {word}=('{names}',)")
        for name in names:
            if name not in allowed_names:
                raise ConfigError(
                    f"action: this model cannot {word} '{name}'; it was trained to {word}: "
                    f"{', '.join(allowed_names) or 'nothing'}"
                )
            view[COLUMNS[name]] = 1.0
    return action_between(torch.tensor([source]), torch.tensor([target]), spec)[0]

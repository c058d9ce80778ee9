"""Space of the actions that a run was trained with: ranges of its entries, units, and views that an action leads to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from dali_pipelines.augmentations import COLUMNS, OP_BY_NAME, Op
from iwm.actions import ActionSpec, action_schema, jitter_ranges
from iwm.config import Config, ConfigError


@dataclass(frozen=True)
class ActionEntry:
    """One entry of an action: the change of a jitter parameter, or the flag of a destructive op of a view."""

    name: str
    op: Op
    view: str
    """`source` or `target` for a flag; empty for a change."""
    scale: float
    """Divisor of the change, above 0."""
    low: float
    """Smallest value in training."""
    high: float
    """Largest value in training."""
    logarithm: bool
    """True where the change of a factor is encoded as the logarithm of its ratio."""

    @property
    def is_flag(self) -> bool:
        return bool(self.view)

    @property
    def is_free(self) -> bool:
        """True where the entry changed in training."""
        return self.low < self.high

    def change(self, values: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Return values of a jitter entry in the op's unit: the difference of factors, ratio minus 1, or degrees."""
        changes = values * self.scale
        return (torch.expm1(changes) if self.logarithm else changes) * self.op.unit_scale

    @property
    def span(self) -> float:
        """Width of a jitter entry's range in training, in the op's unit."""
        low, high = self.change(torch.tensor([self.low, self.high], dtype=torch.float64)).tolist()
        return float(high - low)


@dataclass(frozen=True)
class ActionSpace:
    """Actions that a run could have been trained with."""

    entries: tuple[ActionEntry, ...]
    """Entries in the order of an action."""

    @property
    def jitter(self) -> tuple[int, ...]:
        """Indices of the jitter entries that changed in training."""
        return tuple(i for i, entry in enumerate(self.entries) if entry.is_free and not entry.is_flag)

    @property
    def flags(self) -> tuple[int, ...]:
        """Indices of the flags that changed in training."""
        return tuple(i for i, entry in enumerate(self.entries) if entry.is_free and entry.is_flag)

    def bounds(self, device: torch.device) -> tuple[Float[Tensor, "k"], Float[Tensor, "k"]]:
        """Return the smallest and the largest value of each entry."""
        low, high = zip(*((entry.low, entry.high) for entry in self.entries), strict=True)
        return torch.tensor(low, device=device), torch.tensor(high, device=device)

    def at(self, shares: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        """Return the actions at shares (0 to 1) of each entry's range; flags are rounded."""
        low, high = self.bounds(shares.device)
        actions = low + shares.clamp(0, 1) * (high - low)
        for i, entry in enumerate(self.entries):
            if entry.is_flag:
                actions[..., i] = actions[..., i].round()
        return actions

    def lattice(self, points: int, device: torch.device) -> Float[Tensor, "q k"]:
        """Return the null action and low-discrepancy points of all entries, at most `points`, all different.

        Flags are rounded coordinates, so the number of points does not grow with the number of entries. The points are
        the same in every call.
        """
        sobol = torch.quasirandom.SobolEngine(len(self.entries), scramble=True, seed=0)
        null = torch.zeros(1, len(self.entries))
        drawn = torch.cat([null, self.at(sobol.draw(points - 1))])
        distinct = list(dict.fromkeys(map(tuple, drawn.tolist())))
        return torch.tensor(distinct, device=device)

    def applied(self, source: Float[Tensor, "b p"], actions: Float[Tensor, "b k"]) -> Float[Tensor, "b p"]:
        """Return the params of the target view that actions lead to from a source view with these params.

        Ops of the source that the action does not undo remain. An op that it applies has its mean parameter of
        training's levels.
        """
        target = source.clone()
        for entry, values in zip(self.entries, actions.unbind(1), strict=True):
            column = COLUMNS[entry.op.name]
            if not entry.is_flag:
                changes = values * entry.scale
                target[:, column] = (
                    target[:, column] * changes.exp() if entry.logarithm else target[:, column] + changes
                )
            elif entry.view == "source":
                target[:, column] = torch.where(values > 0, 0.0, target[:, column])
            else:
                level = entry.op.levels[len(entry.op.levels) // 2]
                target[:, column] = torch.where(values > 0, level, target[:, column])
        return target


def action_space(config: Config, spec: ActionSpec) -> ActionSpace:
    """Return the space of a run's actions.

    Raises ConfigError, with the remedy, for a run without conditioning and for one whose views never differ.
    """
    if config.action.conditioning == "none":
        raise ConfigError(
            "action: this model was trained with action.conditioning none, so no action can be inferred from its "
            "predictions; use a run with action.conditioning feature or sequence"
        )
    changes, entries = jitter_ranges(config), []
    for name, described in zip(spec.names, action_schema(config, spec), strict=True):
        view, _, op_name = ("", "", name) if name in changes else name.partition("_")
        op, scale, (low, high) = (
            OP_BY_NAME[op_name],
            cast("float", described["scale"]),
            cast("list[float]", described["range"]),
        )
        logarithm = config.action.jitter_encoding == "log_ratio" and op.is_factor
        entries.append(ActionEntry(name, op, view, scale, low, high, logarithm))
    space = ActionSpace(tuple(entries))
    if not space.jitter and not space.flags:
        raise ConfigError(
            "action: the views of this model's training never differed in colour, so there is no action to infer; use "
            "a run with jitter or destructive augmentations"
        )
    return space

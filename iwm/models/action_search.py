"""Search for the action that leads from a source to a target, by gradient through the predictor.

A lattice of actions gives the starts. Adam moves the changes of the jitter, in units of their ranges and inside them;
flags stay as they are during a descent. Then single flips of flags are tried: the nearest one is descended from, and
the result is kept where it is nearer. Every pair is searched for by itself: its answer does not depend on the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from iwm.action_space import ActionSpace
from iwm.models.action_energy import ActionEnergy
from iwm.search_settings import GradientSettings

BETAS = (0.9, 0.99)
"""Decays of Adam's means of gradients and of their squares; short, because a descent has few steps."""


class FoundActions(NamedTuple):
    """Nearest actions of a search, one for each pair."""

    actions: Float[Tensor, "b k"]
    distances: Float[Tensor, " b"]


def search_by_gradient(
    energy: ActionEnergy, space: ActionSpace, settings: GradientSettings
) -> tuple[FoundActions, FoundActions]:
    """Return the nearest points of the lattice, and the nearest actions after the descent."""
    lattice = space.lattice(settings.points, energy.device)
    everywhere = energy.from_each(lattice)
    distances, points = everywhere.min(1)
    coarse = FoundActions(lattice[points], distances)
    near = _starts(everywhere, lattice[:, list(space.flags)], settings.starts)
    pairs, starts = torch.arange(len(energy), device=energy.device), near.shape[1]
    descended = descend(energy, space, settings, pairs.repeat_interleave(starts), lattice[near.flatten()])
    best = descended.distances.view(-1, starts).argmin(1)
    found = FoundActions(*(values.view(len(energy), starts, *values.shape[1:])[pairs, best] for values in descended))
    return coarse, _flip(energy, space, settings, found)


def _starts(everywhere: Float[Tensor, "b q"], flags: Float[Tensor, "q f"], count: int) -> Int64[Tensor, "b starts"]:
    """Return the nearest points of the lattice, of which no two have the same flags where others are left."""
    remaining, chosen = everywhere.clone(), []
    kinds = flags.unique(dim=0, return_inverse=True)[1] if flags.shape[1] else torch.arange(len(flags)).to(flags.device)
    for _ in range(min(count, everywhere.shape[1])):
        chosen.append(remaining.argmin(1))
        remaining = remaining.masked_fill(kinds == kinds[chosen[-1]][:, None], math.inf)
        used = remaining.isinf().all(1)
        remaining[used] = everywhere[used].scatter(1, torch.stack(chosen, 1)[used], math.inf)
    return torch.stack(chosen, dim=1)


def descend(
    energy: ActionEnergy,
    space: ActionSpace,
    settings: GradientSettings,
    pairs: Int64[Tensor, " r"],
    starts: Float[Tensor, "r k"],
) -> FoundActions:
    """Move actions [r, k] of these pairs to smaller distances; return the nearest of all steps, the start included."""
    if not space.jitter:
        return FoundActions(starts, energy.distances(pairs, starts))
    low, high = space.bounds(starts.device)
    moved = torch.zeros_like(low)
    moved[list(space.jitter)] = (high - low)[list(space.jitter)]
    actions, nearest, least = (
        starts,
        starts,
        torch.full((len(starts),), math.inf, dtype=torch.float64).to(starts.device),
    )
    mean, square = torch.zeros_like(starts), torch.zeros_like(starts)
    for step in range(settings.steps + 1):
        if step == settings.steps:
            distances = energy.distances(pairs, actions)
        else:
            distances, gradient = energy.gradients(pairs, actions)
        # A distance that is not finite stays, so that a broken model cannot have an answer.
        nearer = ~(distances >= least)
        nearest, least = torch.where(nearer[:, None], actions, nearest), torch.where(nearer, distances, least)
        if step < settings.steps:
            gradient = gradient * moved
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient.square(), 1 - BETAS[1])
            rate = settings.rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
            direction = (mean / (1 - BETAS[0] ** (step + 1))) / ((square / (1 - BETAS[1] ** (step + 1))).sqrt() + 1e-12)
            actions = torch.minimum(torch.maximum(actions - rate * direction * moved, low), high)
    return FoundActions(nearest, least)


def _flip(energy: ActionEnergy, space: ActionSpace, settings: GradientSettings, found: FoundActions) -> FoundActions:
    """Flip the flag whose flip is nearest, descend, keep the result where it is nearer, and repeat for those pairs."""
    actions, distances = found
    pairs, count = torch.arange(len(energy), device=energy.device), len(space.flags)
    for _ in space.flags:
        flipped = actions[pairs, None].repeat(1, count, 1)
        for i, flag in enumerate(space.flags):
            flipped[:, i, flag] = 1 - flipped[:, i, flag]
        tried = energy.distances(pairs.repeat_interleave(count), flipped.flatten(0, 1)).view(-1, count)
        nearest = flipped[torch.arange(len(pairs), device=pairs.device), tried.argmin(1)]
        better = descend(energy, space, settings, pairs, nearest)
        kept = (better.distances < distances[pairs]).nonzero()[:, 0]
        pairs = pairs[kept]
        if not len(pairs):
            break
        actions = actions.index_copy(0, pairs, better.actions[kept])
        distances = distances.index_copy(0, pairs, better.distances[kept])
    return FoundActions(actions, distances)

"""Search for the action that leads from a source to a target by the cross-entropy method (CEM).

Changes of the jitter are drawn from normal distributions, flags from coin flips. After each round both are fitted to
the nearest samples. All pairs share the random numbers of a round, so that the answer of a pair does not depend on the
other pairs of the batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from iwm.action_space import ActionSpace
from iwm.models.action_energy import ActionEnergy
from iwm.models.action_search import FoundActions
from iwm.search_settings import CEMSettings

LEAST_CHANCE = 0.05
"""Smallest probability of either value of a flag, so that no flag is given up for good."""


@torch.no_grad()
def search_by_cem(energy: ActionEnergy, space: ActionSpace, settings: CEMSettings, seed: int = 0) -> FoundActions:
    """Return the nearest actions of all rounds. Raises ConfigError where there are not more samples than elites."""
    settings.check()
    generator = torch.Generator().manual_seed(seed)
    b, q, device = len(energy), settings.samples, energy.device
    low, high = space.bounds(device)
    width = torch.where(high > low, high - low, 1.0)
    flags = torch.tensor([entry.is_flag for entry in space.entries], device=device)
    pairs = torch.arange(b, device=device)
    centre = (torch.zeros(b, len(low), device=device) - low) / width
    centre[:, flags] = 0.5
    deviation = torch.full_like(centre, 0.5)
    nearest = torch.zeros(b, len(low), device=device)
    least = energy.distances(pairs, nearest)
    for _ in range(settings.rounds):
        normal = torch.randn(q, len(low), generator=generator).to(device)
        uniform = torch.rand(q, len(low), generator=generator).to(device)
        samples = centre[:, None] + deviation[:, None] * normal
        samples = space.at(torch.where(flags, (uniform < centre[:, None]).to(samples.dtype), samples))
        distances = energy.distances(pairs.repeat_interleave(q), samples.flatten(0, 1)).view(b, q)
        elites = distances.topk(settings.elites, largest=False)
        nearer = ~(elites.values[:, 0] >= least)
        nearest = torch.where(nearer[:, None], samples[pairs, elites.indices[:, 0]], nearest)
        least = torch.where(nearer, elites.values[:, 0], least)
        centre, deviation = _fitted((samples[pairs[:, None], elites.indices] - low) / width, flags, settings)
    return FoundActions(nearest, least)


def _fitted(
    elites: Float[Tensor, "b e k"], flags: Tensor, settings: CEMSettings
) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Return the means and standard deviations of the next round, as shares of each entry's range."""
    centre = elites.mean(1)
    chances = centre.clamp(LEAST_CHANCE, 1 - LEAST_CHANCE)
    deviation = elites.std(1, unbiased=False).clamp_min(settings.least_deviation)
    return torch.where(flags, chances, centre), deviation

"""Regressor of the action: a baseline that knows the encoder's features and not the predictor.

A network with one hidden layer reads the change of the jitter and the flags from the target encoder's features of
source and target, averaged over tokens. It is trained on pairs of training images, sampled as the evaluated ones.
Weight decay and epoch are chosen on a fifth of those images, which it is not trained on.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from iwm.action_space import ActionSpace
from iwm.evaluation.action_pairs import ActionPairs, PairKind, sample_pairs
from iwm.evaluation.action_settings import RegressorSettings
from iwm.models.world_model import WorldModel

LEARNING_RATE = 2e-3
BATCH = 128
"""Pairs of each step."""
HELD_OUT = 5
"""Number of training images of which one is held out to choose by."""
AT_A_TIME = 16
"""Training images whose pairs are in memory at a time."""


@dataclass(frozen=True)
class Regressor:
    """Trained network and the scale of its inputs."""

    network: nn.Module
    mean: Float[Tensor, "f"]
    deviation: Float[Tensor, "f"]
    space: ActionSpace

    @torch.no_grad()
    def answer(self, inputs: Float[Tensor, "b f"]) -> Float[Tensor, "b k"]:
        """Return the actions, on the CPU; flags are 0 or 1."""
        with torch.autocast("cpu", enabled=False):
            out: Tensor = self.network((inputs - self.mean) / self.deviation)
        low, high = self.space.bounds(out.device)
        flags = list(self.space.flags)
        actions = low + out * (high - low)
        actions[:, flags] = (out[:, flags] > 0).float()
        return actions


@torch.no_grad()
def pair_features(model: WorldModel, pairs: ActionPairs, batch_size: int) -> Float[Tensor, "b f"]:
    """Return each pair's inputs on the CPU: the target's pooled features, and how they differ from the source's."""

    def pooled(images: UInt8[Tensor, "n h w 3"]) -> Float[Tensor, "n d"]:
        return torch.cat([model.encode(part, "teacher").float().mean(1) for part in images.split(batch_size)])

    source, target = pooled(pairs.sources)[pairs.source_of], pooled(pairs.targets)
    return torch.cat([target, target - source], dim=1).cpu()


def train_regressor(
    model: WorldModel,
    images: UInt8[Tensor, "n h w 3"],
    kind: PairKind,
    space: ActionSpace,
    settings: RegressorSettings,
    batch_size: int,
    seed: int,
) -> Regressor:
    """Sample pairs of training images and fit the network to their true actions."""
    generator = torch.Generator().manual_seed(seed)
    views, spec = model.config.views, model.action_spec
    inputs, actions = [], []
    for part in images.split(AT_A_TIME):
        pairs = sample_pairs(part, kind, views, spec, settings.num_targets, generator)
        inputs.append(pair_features(model, pairs, batch_size))
        actions.append(pairs.actions.cpu())
    image_of = torch.arange(len(images)).repeat_interleave(settings.num_targets)
    with torch.random.fork_rng(devices=()), torch.autocast("cpu", enabled=False):
        torch.manual_seed(seed)
        return fit_regressor(torch.cat(inputs), torch.cat(actions), image_of, space, settings)


@torch.enable_grad()
def fit_regressor(
    inputs: Float[Tensor, "n f"],
    actions: Float[Tensor, "n k"],
    image_of: Int64[Tensor, " n"],
    space: ActionSpace,
    settings: RegressorSettings,
) -> Regressor:
    """Fit on four of five images; keep the weight decay and the epoch with the smallest loss on the others."""
    held_out: Bool[Tensor, " n"] = image_of % HELD_OUT == 0
    mean, deviation = inputs[~held_out].mean(0), inputs[~held_out].std(0).clamp_min(1e-6)
    scaled = (inputs - mean) / deviation
    low, high = space.bounds(actions.device)
    shares = (actions - low) / torch.where(high > low, high - low, 1.0)
    jitter, flags = list(space.jitter), list(space.flags)

    def loss(out: Float[Tensor, "m k"], wanted: Float[Tensor, "m k"]) -> Float[Tensor, ""]:
        changes = (out[:, jitter] - wanted[:, jitter]).abs().sum(1)
        switched = F.binary_cross_entropy_with_logits(out[:, flags], wanted[:, flags], reduction="none").sum(1)
        return (changes + switched).mean()

    least, best = math.inf, None
    train = (~held_out).nonzero()[:, 0]
    for penalty in settings.penalties:
        network = nn.Sequential(
            nn.Linear(inputs.shape[1], settings.width), nn.ReLU(), nn.Linear(settings.width, actions.shape[1])
        )
        steps = settings.epochs * math.ceil(len(train) / BATCH)
        optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=penalty)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(settings.epochs):
            for batch in train[torch.randperm(len(train))].split(BATCH):
                optimizer.zero_grad()
                loss(network(scaled[batch]), shares[batch]).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                score = loss(network(scaled[held_out]), shares[held_out]).item()
            if best is None or score < least:
                least, best = score, copy.deepcopy(network)
    assert best is not None  # --regressor.penalties is checked to have one
    return Regressor(best.requires_grad_(False), mean, deviation, space)

"""Distance between the prediction under an action and the features of a target, for a batch of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""Predictor: from context features [b, n, d] and actions [b, k] to predicted target features [b, n, d]."""


@dataclass
class ActionEnergy:
    """Distances between predictions and target features, which a search makes small.

    Distances are Euclidean, between features averaged over tokens (`pooled`) or between all tokens. Differences are
    taken in float32 and summed in float64, also under autocast.
    """

    predict: Predict
    contexts: Float[Tensor, "s n d"]
    """Features of the sources."""
    source_of: Int64[Tensor, " b"]
    """Source of each pair. Several pairs may share one."""
    targets: Float[Tensor, "b n d"]
    """Target features of each pair, normalised as in the loss."""
    pooled: bool
    batch_size: int = 256
    """Predictions computed at a time, which bounds the memory."""
    predictions: int = 0
    """Number of predictions computed until now, with or without gradient."""

    vectors: Float[Tensor, "b f"] = field(init=False)
    """Targets as they are compared: pooled or flat, float32."""

    def __post_init__(self) -> None:
        self.vectors = self._compared(self.targets)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.source_of)

    @property
    def device(self) -> torch.device:
        return self.contexts.device

    @torch.no_grad()
    def distances(self, pairs: Int64[Tensor, " r"], actions: Float[Tensor, "r k"]) -> Float[Tensor, " r"]:
        """Return the distance of each of these pairs under its action, float64."""
        parts = zip(pairs.split(self.batch_size), actions.split(self.batch_size), strict=True)
        return torch.cat([self._squared(*part).sqrt() for part in parts])

    def gradients(
        self, pairs: Int64[Tensor, " r"], actions: Float[Tensor, "r k"]
    ) -> tuple[Float[Tensor, " r"], Float[Tensor, "r k"]]:
        """Return the distances, float64, and the gradients of their squares by the actions, float32."""
        distances, gradients = [], []
        for part, given in zip(pairs.split(self.batch_size), actions.split(self.batch_size), strict=True):
            with torch.enable_grad():
                free = given.detach().requires_grad_()
                squared = self._squared(part, free)
                gradients.append(torch.autograd.grad(squared.sum(), free)[0])
            distances.append(squared.detach().sqrt())
        return torch.cat(distances), torch.cat(gradients)

    @torch.no_grad()
    def from_each(self, actions: Float[Tensor, "q k"]) -> Float[Tensor, "b q"]:
        """Return the distance of every pair under every action, float64; each source is predicted once per action."""
        found = torch.empty(len(self), len(actions), dtype=torch.float64, device=self.device)
        for source in self.source_of.unique().tolist():
            pairs = (self.source_of == source).nonzero()[:, 0]
            for first in range(0, len(actions), self.batch_size):
                part = actions[first : first + self.batch_size]
                predicted = self._predicted(self.contexts[source].expand(len(part), -1, -1), part)
                for pair in pairs.tolist():
                    found[pair, first : first + len(part)] = _squares(predicted - self.vectors[pair]).sqrt()
        return found

    def _squared(self, pairs: Int64[Tensor, " r"], actions: Float[Tensor, "r k"]) -> Float[Tensor, " r"]:
        predicted = self._predicted(self.contexts[self.source_of[pairs]], actions)
        return _squares(predicted - self.vectors[pairs])

    def _predicted(self, contexts: Float[Tensor, "r n d"], actions: Float[Tensor, "r k"]) -> Float[Tensor, "r f"]:
        self.predictions += len(actions)
        return self._compared(self.predict(contexts, actions))

    def _compared(self, features: Float[Tensor, "r n d"]) -> Float[Tensor, "r f"]:
        return features.float().mean(1) if self.pooled else features.float().flatten(1)


def _squares(differences: Float[Tensor, "r f"]) -> Float[Tensor, " r"]:
    return differences.double().square().sum(-1)

"""An image's bank in latent space: its copies as the target encoder sees them, and how far predictions are from them.

MRR, retrieval, grids of single parameters and the undoing of corruptions all ask it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dali_pipelines.augmentation import IDENTITY
from dali_pipelines.replay import photometric
from iwm.actions import ActionSpec, action_between

if TYPE_CHECKING:
    from iwm.models.world_model import WorldModel

Distance = Literal["pooled", "per_token"]
DISTANCES: tuple[Distance, ...] = ("pooled", "per_token")
Context = Literal["teacher", "student"]
CONTEXTS: tuple[Context, ...] = ("teacher", "student")

UNTOLD = "Without conditioning the predictor is told nothing: all actions give one prediction, by construction."
"""What stands under the figures of a run with action.conditioning `none`."""


@dataclass(frozen=True)
class Bank:
    """One image's copies as the target encoder sees them: what predictions are compared with."""

    copies: UInt8[Tensor, "k h w 3"]
    params: Float[Tensor, "k p"]
    """What was done to each copy, in the order of PHOTOMETRIC_FIELDS."""
    targets: Float[Tensor, "k n d"]
    norms: Float[Tensor, "distance k"]
    """Norms of the copies' target features: the scale of TIE. Axis 0 follows DISTANCES."""


@torch.no_grad()
def embed_bank(
    model: WorldModel, image: UInt8[Tensor, "h w 3"], params: Float[Tensor, "k p"], chunk: int = 256
) -> Bank:
    """Make the copies of a clean image that `params` describe and embed them, `chunk` at once."""
    copies = photometric(image.expand(len(params), -1, -1, -1), params, model.config.views.colour)
    targets = torch.cat([model.targets(part).float() for part in copies.split(chunk)])
    return Bank(copies, params, targets, torch.stack([each.norm(dim=1) for each in _compared(targets, DISTANCES)]))


def actions_to(
    params: Float[Tensor, "k p"], spec: ActionSpec, source: Float[Tensor, " p"] | None = None
) -> Float[Tensor, "k a"]:
    """The action from one source, given by its photometric params (default: the clean image), to each of `params`."""
    made_by = torch.tensor(IDENTITY, device=params.device) if source is None else source
    return action_between(made_by.expand_as(params), params, spec)


@torch.no_grad()
def predicted_distances(
    model: WorldModel,
    bank: Bank,
    sources: UInt8[Tensor, "s h w 3"],
    actions: Float[Tensor, "s q a"],
    *,
    distances: Sequence[Distance] = DISTANCES,
    contexts: Sequence[Context] = CONTEXTS,
    chunk: int = 256,
) -> Float[Tensor, "distance context s q k"]:
    """Apply q actions to each source view in latent space, and measure how far every prediction is from every copy.

    float64, axes 0 and 1 as asked for. `chunk` bounds the memory: so many predictions are made at once.
    """
    compared = _compared(bank.targets, distances)

    def of_source(features: Float[Tensor, "n d"], told: Float[Tensor, "q a"]) -> Float[Tensor, "distance q k"]:
        rows = []
        for part in told.split(chunk):
            predictions = _compared(model.predict(features.expand(len(part), -1, -1), part).float(), distances)
            rows.append(torch.stack([_l2(p, t) for p, t in zip(predictions, compared, strict=True)]))
        return torch.cat(rows, dim=1)

    by_context = []
    for context in contexts:
        encoded = torch.cat([model.encode(part, context) for part in sources.split(chunk)])
        by_context.append(torch.stack([of_source(*each) for each in zip(encoded, actions, strict=True)], dim=1))
    return torch.stack(by_context, dim=1)


def _compared(features: Float[Tensor, "b n d"], distances: Sequence[Distance]) -> list[Float[Tensor, "b f"]]:
    """What each distance is taken between."""
    return [features.mean(1) if distance == "pooled" else features.flatten(1) for distance in distances]


def _l2(predictions: Float[Tensor, "q f"], bank: Float[Tensor, "k f"]) -> Float[Tensor, "q k"]:
    """L2 distances as one matrix product. In float64: ‖p‖² + ‖t‖² − 2p·t cancels, for the copies differ by little
    against their norms, and a float64 product stays exact whatever TF32 setting the process has."""
    p, t = predictions.double(), bank.double()
    squares = p.square().sum(1, keepdim=True) + t.square().sum(1) - 2 * p @ t.T
    return squares.clamp_min(0).sqrt()

"""z_inv: invariant representations made by averaging predictions over actions (paper, appendix H)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dali_pipelines.augmentation import IDENTITY, JITTER_FIELDS, Photometric
from iwm.evaluation.bank import actions_to
from iwm.evaluation.mrr import TIE
from iwm.models.world_model import WorldModel


@torch.no_grad()
def marginalise(
    model: WorldModel,
    features: Float[Tensor, "b n d"],
    params: Float[Tensor, "b k p"],
    sizes: Sequence[int],
    chunk: int = 256,
) -> Float[Tensor, "b s d"]:
    """Pooled z_inv of each image for each of `sizes`, the mean of its first so many predictions; float32.

    `features`: of whole clean images; `params`: what each prediction is told (PHOTOMETRIC_FIELDS order). `chunk`
    predictions are made at once.
    """
    b, k, _ = params.shape
    actions = actions_to(params.flatten(0, 1), model.action_spec)
    rows = torch.arange(b * k, device=params.device).split(chunk)
    pooled = torch.cat([model.predict(features[part // k], actions[part]).float().mean(1) for part in rows])
    sums = pooled.unflatten(0, (b, k)).cumsum(1)
    return torch.stack([sums[:, size - 1] / size for size in sizes], dim=1)


def strengths(params: Float[Tensor, "k p"], jitter: Photometric) -> Float[Tensor, " k"]:
    """How strong each copy's jitter is: 0 nothing, 1 every parameter changed by the most that `jitter` allows."""
    most = torch.tensor(jitter.strengths, device=params.device)
    change = (params - torch.tensor(IDENTITY, device=params.device))[:, : len(JITTER_FIELDS)].abs()
    return (change[:, most > 0] / most[most > 0]).mean(1)


@dataclass(frozen=True)
class Neighbours:
    """What the marginalised representations of one image retrieve, in its bank of the clean image and k copies."""

    ranks: Float[Tensor, " s"]
    """Of the clean image among k + 1, 1 the nearest; equally near ones share their mean rank."""
    order: Int64[Tensor, "s k1"]
    """The bank from the nearest on: 0 the clean image, i the copy i - 1."""


def neighbours(clean: Float[Tensor, " d"], copies: Float[Tensor, "k d"], queries: Float[Tensor, "s d"]) -> Neighbours:
    """Look up each of the queries in the bank of the clean image and its copies, by Euclidean distance."""
    bank = torch.cat([clean[None], copies]).double()
    distances = torch.linalg.vector_norm(queries.double()[:, None] - bank, dim=2)
    true = distances[:, :1]
    tolerance = TIE * bank[0].norm()
    nearer = (distances < true - tolerance).sum(1)
    tied = ((distances - true).abs() <= tolerance).sum(1)
    return Neighbours(nearer + (tied + 1) / 2, distances.argsort(dim=1, stable=True))

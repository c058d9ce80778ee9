"""Features in few numbers: turned so that a few components hold nearly all of their distances, and rounded to 16 bits.

For what is looked at in a browser. How far ranks survive is measured, not believed: `agreement`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from iwm.evaluation.mrr import rank

LARGEST = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class Features:
    """Pooled features of one image's bank and the predictions that are looked up in it."""

    bank: Float[Tensor, "k d"]
    predictions: Float[Tensor, "s k d"]
    """s series of predictions; prediction i of each ought to be nearest to entry i of the bank."""

    @property
    def ranks(self) -> Float[Tensor, "s k"]:
        """Ranks of the true entries by the maths of MRR (mrr.rank), distances in float64."""
        bank = self.bank.double()
        distances = torch.stack([torch.cdist(series.double(), bank) for series in self.predictions])
        return rank(distances[None], self.bank.norm(dim=1)[None])[0]


@dataclass(frozen=True)
class Compact:
    """The same in few numbers."""

    points: Int16[Tensor, "s1 k c"]
    """The bank, then the series of predictions; times `scale`, distances among them are those of the features."""
    scale: float
    norms: Float[Tensor, " k"]
    """Norms of the bank's features: the scale of ties (mrr.TIE)."""

    @property
    def ranks(self) -> Float[Tensor, "s k"]:
        """As those of `Features`, from what is kept."""
        points = self.points.double() * self.scale
        distances = torch.stack([torch.cdist(series, points[0]) for series in points[1:]])
        return rank(distances[None], self.norms[None])[0]


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions by falling share of the squared distances, and how many hold enough of them."""

    columns: Float[Tensor, "d d"]
    enough: int


def directions(features: Features, kept: float) -> Directions:
    """Principal directions of bank and predictions together; so many are enough as hold the share `kept` (0 to 1).

    The variance that a direction holds is, but for a factor, its part of the sum of all squared distances.
    """
    rows = _rows(features).flatten(0, 1)
    centred = rows - rows.mean(0)
    variances, columns = torch.linalg.eigh(centred.T @ centred)
    held = variances.clamp_min(0).flip(0).cumsum(0)
    return Directions(columns.flip(1), min(int((held < kept * held[-1]).sum()) + 1, len(held)))


def compact(features: Features, columns: Float[Tensor, "d c"]) -> Compact:
    """The features in some orthonormal directions, in 16 bits with one scale."""
    rows = _rows(features)
    points = (rows - rows.mean((0, 1))) @ columns
    scale = points.abs().max().clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    return Compact((points / scale).round().to(torch.int16), scale.item(), features.bank.norm(dim=1))


@dataclass(frozen=True)
class Agreement:
    """How far the compact features answer as the features do, over all images. Lists are by series."""

    mrr: list[float]
    mrr_compact: list[float]
    same_rank: float
    """Share of the true entries whose rank is the same."""
    largest_difference: float
    """Between two such ranks."""


def agreement(features: list[Features], compacts: list[Compact]) -> Agreement:
    """Compare the ranks of all true entries."""
    exact = torch.stack([each.ranks for each in features])
    kept = torch.stack([each.ranks for each in compacts])
    return Agreement(
        mrr=(1 / exact).mean((0, 2)).tolist(),
        mrr_compact=(1 / kept).mean((0, 2)).tolist(),
        same_rank=(exact == kept).double().mean().item(),
        largest_difference=(exact - kept).abs().max().item(),
    )


def _rows(features: Features) -> Float[Tensor, "s1 k d"]:
    return torch.cat([features.bank[None], features.predictions]).double()

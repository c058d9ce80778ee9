"""PCA compression of pooled features to int16, for the explorer in the browser.

A few components hold nearly all of the squared distances. `rank_agreement` measures how many ranks are preserved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from iwm.evaluation.bank import rank_of_target

INT16_MAX = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class BankFeatures:
    """Pooled features of one image's bank and the predictions that are ranked in it."""

    bank: Float[Tensor, "k d"]
    predictions: Float[Tensor, "s k d"]
    """s series of predictions; the target of prediction i is entry i of the bank."""

    @property
    def ranks(self) -> Float[Tensor, "s k"]:
        """Ranks of the true entries as in MRR (bank.rank_of_target), from float64 distances."""
        bank = self.bank.double()
        distances = torch.stack([torch.cdist(series.double(), bank) for series in self.predictions])
        return rank_of_target(distances[None], self.bank.norm(dim=1)[None])[0]


@dataclass(frozen=True)
class CompressedFeatures:
    """Compressed features of one image's bank and predictions."""

    points: Int16[Tensor, "s1 k c"]
    """Bank, then the series of predictions. Distances between points times `scale` are those of the features."""
    scale: float
    norms: Float[Tensor, " k"]
    """Norms of the bank's features, the scale of bank.TIE_TOLERANCE."""

    @property
    def ranks(self) -> Float[Tensor, "s k"]:
        """Ranks of the true entries, from the compressed features."""
        points = self.points.double() * self.scale
        distances = torch.stack([torch.cdist(series, points[0]) for series in points[1:]])
        return rank_of_target(distances[None], self.norms[None])[0]


@dataclass(frozen=True)
class PCABasis:
    """Orthonormal directions by decreasing variance, and the number of components to retain."""

    components: Float[Tensor, "d d"]
    num_components: int


def fit_pca_basis(features: BankFeatures, explained: float) -> PCABasis:
    """Fit PCA to bank and predictions together; retain the components that explain the share `explained` (0 to 1).

    The variance of a direction is proportional to its part of the sum of all squared distances.
    """
    rows = _rows(features).flatten(0, 1)
    centred = rows - rows.mean(0)
    variances, columns = torch.linalg.eigh(centred.T @ centred)
    held = variances.clamp_min(0).flip(0).cumsum(0)
    return PCABasis(columns.flip(1), min(int((held < explained * held[-1]).sum()) + 1, len(held)))


def compress(features: BankFeatures, columns: Float[Tensor, "d c"]) -> CompressedFeatures:
    """Project the features on orthonormal `columns` and quantise them to int16 with one scale."""
    rows = _rows(features)
    points = (rows - rows.mean((0, 1))) @ columns
    scale = points.abs().max().clamp_min(torch.finfo(torch.float32).tiny) / INT16_MAX
    return CompressedFeatures((points / scale).round().to(torch.int16), scale.item(), features.bank.norm(dim=1))


@dataclass(frozen=True)
class RankAgreement:
    """Agreement of ranks from compressed and exact features, over all images. Lists are by series."""

    mrr: list[float]
    mrr_compressed: list[float]
    same_rank: float
    """Share of the true entries whose rank is the same (0 to 1)."""
    largest_difference: float
    """Largest difference between an exact and a compressed rank."""


def rank_agreement(features: list[BankFeatures], compacts: list[CompressedFeatures]) -> RankAgreement:
    """Compare the ranks of all true entries from exact and compressed features."""
    exact = torch.stack([item.ranks for item in features])
    compressed = torch.stack([item.ranks for item in compacts])
    return RankAgreement(
        mrr=(1 / exact).mean((0, 2)).tolist(),
        mrr_compressed=(1 / compressed).mean((0, 2)).tolist(),
        same_rank=(exact == compressed).double().mean().item(),
        largest_difference=(exact - compressed).abs().max().item(),
    )


def _rows(features: BankFeatures) -> Float[Tensor, "s1 k d"]:
    return torch.cat([features.bank[None], features.predictions]).double()

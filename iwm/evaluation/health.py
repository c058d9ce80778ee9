"""Whether features are alive: RankMe and the spread of features over samples. A falling loss shows neither."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def rankme(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Effective rank: exp of the entropy of the normalised singular values (Garrido et al., 2023, equation 1).

    Between 1 (all features on one line) and min(n, d) (spread evenly); compare only figures of the same n. NaN if a
    feature is not finite. Stays on the features' device.
    """
    if not torch.isfinite(features).all():
        return torch.full((), torch.nan, device=features.device)
    singular_values = torch.linalg.svdvals(features.float())
    share = singular_values / singular_values.sum().clamp_min(torch.finfo(torch.float32).tiny) + 1e-7
    return torch.exp(-(share * share.log()).sum())


@torch.no_grad()
def feature_std(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Standard deviation of each dimension over the samples, averaged over dimensions: 0 means collapse."""
    return features.float().std(dim=0).mean()

"""Bank of target features of an image's augmented views, and distances from predictions to it.

MRR, retrieval, parameter sweeps, corruptions, composition and marginalisation use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dali_pipelines.augmentations import IDENTITY, JitterImpl, PhotometricConfig
from dali_pipelines.replay import apply_photometric
from iwm.actions import ActionSpec, action_between
from iwm.config import ConfigError
from iwm.encoder_outputs import ENCODERS, EncoderName
from iwm.evaluation.settings import DISTANCES, BankSize, Distance
from iwm.models.world_model import WorldModel

MIN_FACTOR = 0.1
"""Smallest factor in a grid of single values: a factor of 0 gives a black view."""

TIE_TOLERANCE = 1e-6
"""Distances that differ by less than this share of the true view's norm are ties (float32 rounding)."""


UNCONDITIONED_NOTE = (
    "Without conditioning the predictor receives no action: all actions give the same prediction, by construction."
)
"""Note under the results of a run with action.conditioning `none`."""


@dataclass(frozen=True)
class Bank:
    """Augmented views of one image with their target features, which predictions are compared with."""

    views: UInt8[Tensor, "k h w 3"]
    params: Float[Tensor, "k p"]
    """Augmentation parameters of each view, in the order of PHOTOMETRIC_FIELDS."""
    targets: Float[Tensor, "k n d"]
    norms: Float[Tensor, "distance k"]
    """Norms of the views' target features, the scale of TIE_TOLERANCE. Axis 0 follows DISTANCES."""


@torch.no_grad()
def embed_bank(
    model: WorldModel,
    image: UInt8[Tensor, "h w 3"],
    params: Float[Tensor, "k p"],
    batch_size: int = 256,
    jitter_impl: JitterImpl | None = None,
) -> Bank:
    """Apply each row of `params` to a clean image and embed the views, `batch_size` at a time.

    jitter_impl: computation of the jitter; None: the model's own.
    """
    computed = jitter_impl or model.config.views.jitter_impl
    views = apply_photometric(image.expand(len(params), -1, -1, -1), params, computed)
    targets = torch.cat([model.target_features(part).float() for part in views.split(batch_size)])
    norms = torch.stack([features.norm(dim=1) for features in _pool_or_flatten(targets, DISTANCES)])
    return Bank(views, params, targets, norms)


def actions_from(
    params: Float[Tensor, "k p"], spec: ActionSpec, source: Float[Tensor, " p"] | None = None
) -> Float[Tensor, "k a"]:
    """Return the action from one source to each of `params`; `source`: its parameters (default: the clean image)."""
    source_params = torch.tensor(IDENTITY, device=params.device) if source is None else source
    return action_between(source_params.expand_as(params), params, spec)


@torch.no_grad()
def predicted_distances(
    model: WorldModel,
    bank: Bank,
    sources: UInt8[Tensor, "s h w 3"],
    actions: Float[Tensor, "s q a"],
    *,
    distances: Sequence[Distance] = DISTANCES,
    encoders: Sequence[EncoderName] = ENCODERS,
    batch_size: int = 256,
) -> Float[Tensor, "distance encoder s q k"]:
    """Predict q actions from each source view and return the distance of every prediction to every view of the bank.

    float64; axes 0 and 1 follow `distances` and `encoders`. `batch_size`: predictions computed at a time, which bounds
    the memory.
    """
    compared = _pool_or_flatten(bank.targets, distances)

    def of_source(features: Float[Tensor, "n d"], queries: Float[Tensor, "q a"]) -> Float[Tensor, "distance q k"]:
        rows = []
        for part in queries.split(batch_size):
            rows.append(_distances(model.predict(features.expand(len(part), -1, -1), part), compared, distances))
        return torch.cat(rows, dim=1)

    by_encoder = []
    for encoder in encoders:
        encoded = torch.cat([model.encode(part, encoder) for part in sources.split(batch_size)])
        by_encoder.append(torch.stack([of_source(*pair) for pair in zip(encoded, actions, strict=True)], dim=1))
    return torch.stack(by_encoder, dim=1)


@torch.no_grad()
def distances_to(
    bank: Bank, predictions: Float[Tensor, "q n d"], distances: Sequence[Distance] = DISTANCES
) -> Float[Tensor, "distance q k"]:
    """Return the distance of every prediction to every view of the bank; float64, axis 0 follows `distances`."""
    return _distances(predictions, _pool_or_flatten(bank.targets, distances), distances)


def _distances(
    predictions: Float[Tensor, "q n d"], compared: Sequence[Float[Tensor, "k _"]], distances: Sequence[Distance]
) -> Float[Tensor, "distance q k"]:
    pairs = zip(_pool_or_flatten(predictions.float(), distances), compared, strict=True)
    return torch.stack([_l2(*pair) for pair in pairs])


def _pool_or_flatten(features: Float[Tensor, "b n d"], distances: Sequence[Distance]) -> list[Float[Tensor, "b f"]]:
    """Return the vectors that each distance is computed between."""
    return [features.mean(1) if distance == "pooled" else features.flatten(1) for distance in distances]


def _l2(predictions: Float[Tensor, "q f"], bank: Float[Tensor, "k f"]) -> Float[Tensor, "q k"]:
    """Compute L2 distances as one matrix product, in float64.

    The views differ by little against their norms, so ‖p‖² + ‖t‖² − 2p·t cancels in float32. A float64 product is also
    independent of the process's TF32 setting.
    """
    p, t = predictions.double(), bank.double()
    squares = p.square().sum(1, keepdim=True) + t.square().sum(1) - 2 * p @ t.T
    return squares.clamp_min(0).sqrt()


def derangement(size: int, generator: torch.Generator) -> Int[Tensor, " size"]:
    """Sample a permutation without fixed points: one cycle through all elements (size at least 2)."""
    order = torch.randperm(size, generator=generator)
    permutation = torch.empty_like(order)
    permutation[order] = order.roll(1)
    return permutation


def rank_of_target(
    distances: Float[Tensor, "distance encoder q k"], norms: Float[Tensor, "distance k"]
) -> Float[Tensor, "distance encoder q"]:
    """Return the rank of entry i in row i, from 1; entries tied with it (TIE_TOLERANCE) share their mean rank.

    The true entries are the first q of k. NaN where a distance is not finite, so that a broken model cannot score well.
    """
    true = distances.diagonal(dim1=-2, dim2=-1)[..., None]
    tolerance = TIE_TOLERANCE * norms[:, None, : distances.shape[-2], None]
    nearer = (distances < true - tolerance).sum(-1)
    tied = ((distances - true).abs() <= tolerance).sum(-1)
    ranks = nearer + (tied + 1) / 2
    return ranks.masked_fill(~distances.isfinite().all(-1), torch.nan)


def check_queries(num_queries: int, bank: BankSize) -> None:
    """Raise ConfigError where more views are queried than a bank has."""
    if num_queries > bank.num_views:
        raise ConfigError(f"--num-queries {num_queries}: must be from 2 to --bank.num-views {bank.num_views}")


def check_changes(jitter: PhotometricConfig) -> None:
    """Raise ConfigError where the jitter of a bank has strength 0, so that all of its views are the clean image."""
    if max(jitter.strengths) <= 0:
        raise ConfigError("the run's jitter changes nothing (its strengths are 0); use --bank.scenario default")


def chance_mrr(size: int) -> float:
    """Return the mean reciprocal rank of a random guess in a bank of `size`: H(size) / size."""
    return sum(1 / i for i in range(1, size + 1)) / size

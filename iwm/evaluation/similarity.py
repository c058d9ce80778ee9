"""Cosine similarity of augmented views within and between images (paper, appendix G, figure S3).

Images are augmented several times and embedded; pooled features of one image's views are compared with those
of other images. The augmentation is the run's source view: jitter at probability 1; grayscale, blur and solarize as
often as in training. There is no crop, so views of one image differ only in the parameters that the action describes.

- `within_image`, `between_images`: mean cosine similarity of two different views of one image, and of views of two
  images. An invariant model has `within_image` 1.
- `variance_ratio`: trace of the within-image covariance over trace of the between-image covariance, of features
  that are not normalised. Within: squared distance of a view to the mean of its image's views, summed and
  divided by K(m − 1), for K images of m views. Between: squared distance of an image's mean to the mean of all images,
  summed and divided by K − 1. An invariant model has 0. The ratio is invariant to centring and scaling of all features.

Standard errors are over images: that of the mean for similarities, the jackknife for the ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dali_pipelines.augmentations import PhotometricConfig
from dali_pipelines.replay import apply_photometric, sample_photometric
from dali_pipelines.views import SCENARIOS, Views
from iwm.config import ConfigError
from iwm.encoder_outputs import EncoderName
from iwm.evaluation.colour_scale import ColourScale
from iwm.evaluation.common import EvalContext, mean_and_stderr
from iwm.evaluation.figures import FigureTile, Matrix, TileFigure, write_figures
from iwm.evaluation.result_table import ResultTable
from iwm.evaluation.settings import JITTER_SCENARIOS, SimilaritySettings
from iwm.models.world_model import WorldModel
from iwm.training.checkpoint import CheckpointError


def view_augmentation(views: Views, scenario: str | None = None) -> PhotometricConfig:
    """Return the augmentation of the images: a source view with jitter at probability 1.

    Raises ConfigError for an unknown scenario or one without jitter.
    """
    if scenario is not None and scenario not in JITTER_SCENARIOS:
        raise ConfigError(
            f"--scenario: '{scenario}' is not a scenario with jitter; choose one of {', '.join(JITTER_SCENARIOS)}"
        )
    own = views.source if views.source.jitter_probability > 0 else SCENARIOS["default"].source
    return replace(own if scenario is None else SCENARIOS[scenario].source, jitter_probability=1.0)


@torch.no_grad()
def embed_views(
    model: WorldModel,
    images: UInt8[Tensor, "k h w 3"],
    params: Float[Tensor, "k m p"],
    encoder: EncoderName,
    batch_size: int = 256,
) -> Float[Tensor, "k m d"]:
    """Return pooled features of each image augmented with each row of its `params`; `batch_size` views at a time."""
    k, m, _ = params.shape
    colour = model.config.views.jitter_impl
    parts = [
        model.encode(apply_photometric(images[rows // m], params.flatten(0, 1)[rows], colour), encoder).float().mean(1)
        for rows in torch.arange(k * m, device=images.device).split(batch_size)
    ]
    return torch.cat(parts).unflatten(0, (k, m))


def similarities(features: Float[Tensor, "k m d"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return the mean cosine similarity of each image's views with each other, and with other images' views."""
    k, m, _ = features.shape
    sums = torch.nn.functional.normalize(features.double(), dim=2).sum(1)
    within = (sums.square().sum(1) - m) / (m * (m - 1))
    between = (sums * (sums.sum(0) - sums)).sum(1) / (m * m * (k - 1))
    return within, between


def variance_ratio(features: Float[Tensor, "k m d"]) -> tuple[float, float]:
    """Return the trace of the within-image over the between-image covariance, and its jackknife standard error.

    The module docstring has the definition. NaN where all images have the same mean; the error also for 2 images.
    """
    features = features.double()
    k, m, _ = features.shape
    means = features.mean(1)
    within = (features - means[:, None]).square().sum((1, 2)) / (m - 1)
    deviations = (means - means.mean(0)).square().sum(1)
    # A deviation at the level of rounding counts as 0.
    if deviations.sum() <= k * (1e-6 * means.norm(dim=1).mean()) ** 2:
        return torch.nan, torch.nan
    ratio = (within.mean() / (deviations.sum() / (k - 1))).item()
    if k < 3:
        return ratio, torch.nan
    # Leaving image i out shifts the mean: the sum of squared deviations decreases by k/(k - 1) times its term.
    left = deviations.sum() - deviations * k / (k - 1)
    without = ((within.sum() - within) / (k - 1)) / (left / (k - 2))
    return ratio, ((k - 1) / k * (without - without.mean()).square().sum()).sqrt().item()


def figure(
    keys: Sequence[str], images: UInt8[Tensor, "k h w 3"], features: Float[Tensor, "k m d"], encoder: EncoderName
) -> TileFigure:
    """Return the matrix of cosine similarities of all views, with each image next to its rows."""
    k, m, _ = features.shape
    unit = torch.nn.functional.normalize(features.double(), dim=2).flatten(0, 1)
    matrix = (unit @ unit.T).cpu()
    scale = ColourScale(matrix.min().item(), 1.0)
    alt = f"matrix of the cosine similarities of {k} images, {m} views of each, from {matrix.min():.2f} to 1"
    tile = FigureTile(_separated(scale.colours(matrix), m), alt, exact=True)
    labels = [(key, FigureTile(image, f"photograph {key}")) for key, image in zip(keys, images, strict=True)]
    caption = (
        f"Cosine similarity of the {encoder}'s pooled features: {k} images, {m} augmented views of each (no crop), in "
        "the same order along both sides. Uniform yellow squares on the diagonal: invariant features. Structure within "
        "the squares: features depend on the augmentation."
    )
    return TileFigure("Similarity matrix", caption, matrix=Matrix(tile, labels), scale=scale.bar("cosine similarity"))


def _separated(matrix: UInt8[Tensor, "n n 3"], size: int) -> UInt8[Tensor, "n2 n2 3"]:
    """Return the matrix with white lines, one pixel wide, between blocks of `size` rows and columns."""
    n, lines = len(matrix), (len(matrix) - 1) // size
    places = torch.arange(n) + torch.arange(n) // size
    separated = matrix.new_full((n + lines, n + lines, 3), 255)
    separated[places[:, None], places] = matrix
    return separated


def evaluate(context: EvalContext, settings: SimilaritySettings, output: Path) -> dict[str, Any]:
    """Compute similarities and variance ratio with standard errors; the figure is the matrix of some images.

    Raises ConfigError for invalid settings and fewer than two images, CheckpointError where all images have the same
    features.
    """
    spec = view_augmentation(context.config.views, settings.scenario)
    images, keys = context.first_images(settings.num_images, at_least=2)
    generator = torch.Generator().manual_seed(settings.seed)
    params = torch.stack([sample_photometric(spec, settings.num_views, generator) for _ in keys]).to(images.device)
    features = embed_views(context.model, images, params, settings.encoder, settings.batch_size)
    within, between = similarities(features)
    ratio, error = variance_ratio(features)
    if features.isfinite().all() and ratio != ratio:
        raise CheckpointError(
            f"{context.checkpoint}: all images have the same features: the model has collapsed; evaluate an earlier "
            "checkpoint"
        )
    shown = slice(settings.num_shown)
    matrix = figure(keys[shown], images[shown], features[shown], settings.encoder)
    return {
        "images": len(keys),
        "augmentations": settings.num_views,
        "encoder": settings.encoder,
        "within_image": mean_and_stderr(within),
        "between_images": mean_and_stderr(between),
        "variance_ratio": {"mean": ratio, "standard_error": None if len(keys) < 3 else error},
        "shown": keys[shown],
        **write_figures([matrix], output),
    }


FIGURES = {
    "within_image": "cosine similarity, views of one image",
    "between_images": "cosine similarity, views of two images",
    "variance_ratio": "variance within images / between images",
}
"""Descriptions of the values in a result."""


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the values with their standard errors, one row each."""
    rows = []
    for name, words in FIGURES.items():
        score = result[name]
        error = "" if score["standard_error"] is None else f"{score['standard_error']:.4f}"
        rows.append([words, f"{score['mean']:.4f}", error])
    title = f"Similarity of augmented views, {result['encoder']}"
    caption = (
        f"{result['images']} images, {result['augmentations']} views each. A smaller variance within images means more "
        "invariance."
    )
    return [ResultTable(title, ["", "mean", "standard error"], rows, caption)]

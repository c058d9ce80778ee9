"""How much of an augmentation the representation keeps (paper, appendix G, figure S3).

Held-out images are each augmented a number of times and embedded; pooled features of one image's views are compared
with those of other images. Augmented means the run's own source view (jitter, always applied; grayscale, blur and
solarize as often as in training), the widest colours that an encoder is trained on. There is no crop: all views show
the same pixels, so that what differs within an image is what the action describes, and nothing else.

- `within_image`, `between_images`: mean cosine similarity of two different views of one image, and of views of two
  images. An invariant model has `within_image` 1.
- `variance_ratio`: trace of the within-image covariance over trace of the between-image covariance, of features as
  they are (not of unit length). Within: squared distance of a view to the mean of its image's views, summed and
  divided by K(m − 1), for K images of m views. Between: squared distance of an image's mean to the mean of all images,
  summed and divided by K − 1. An invariant model has 0; centring and scaling all features leave it as it is.

Standard errors are over images: of the mean for similarities, the jackknife's for the ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from dali_pipelines.augmentation import SCENARIOS, Photometric, Views
from dali_pipelines.replay import draw_photometric, photometric
from iwm.config import ConfigError
from iwm.evaluation.bank import Context
from iwm.evaluation.mrr import JITTERED
from iwm.evaluation.over_images import over_images
from iwm.evaluation.settings import Settings as Common
from iwm.evaluation.subject import Subject
from iwm.models.world_model import WorldModel
from iwm.training.checkpoint import CheckpointError


@dataclass(frozen=True)
class Settings(Common):
    """Cosine similarities of augmented images. Writes RUN/eval/similarity.png beside the JSON."""

    images: int = 128
    """Held-out images that the figures are taken over, at least 2."""
    augmentations: int = 16
    """Views of each, at least 2; the paper's 16."""
    shown: int = 8
    """Images in the picture, the first of them."""
    encoder: Context = "teacher"
    """`teacher`: the target encoder. `student`: the context encoder."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(JITTERED))] = None
    """Row of table S2 whose source view augments, the same for runs that are compared. Default: the run's own source
    view, or that of `default` where it has no jitter."""
    chunk: int = 256
    """Views embedded at once; lower it when the device runs out of memory."""


def augmentation(views: Views, scenario: str | None = None) -> Photometric:
    """What the images are augmented with: a source view whose jitter is always applied.

    Raises ConfigError for an unknown scenario or one without jitter.
    """
    if scenario is not None and scenario not in JITTERED:
        raise ConfigError(f"--scenario: '{scenario}' is no scenario with jitter; choose one of {JITTERED}")
    own = views.source if views.source.jitter_probability > 0 else SCENARIOS["default"].source
    return replace(own if scenario is None else SCENARIOS[scenario].source, jitter_probability=1.0)


@torch.no_grad()
def embed_views(
    model: WorldModel,
    images: UInt8[Tensor, "k h w 3"],
    params: Float[Tensor, "k m p"],
    encoder: Context,
    chunk: int = 256,
) -> Float[Tensor, "k m d"]:
    """Pooled features of each image as each row of its `params` (PHOTOMETRIC_FIELDS) makes it, `chunk` at a time."""
    k, m, _ = params.shape
    colour = model.config.views.colour
    parts = [
        model.encode(photometric(images[rows // m], params.flatten(0, 1)[rows], colour), encoder).float().mean(1)
        for rows in torch.arange(k * m, device=images.device).split(chunk)
    ]
    return torch.cat(parts).unflatten(0, (k, m))


def similarities(features: Float[Tensor, "k m d"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """For each image the mean cosine similarity of two of its views, and of its views with other images' views."""
    k, m, _ = features.shape
    sums = torch.nn.functional.normalize(features.double(), dim=2).sum(1)
    within = (sums.square().sum(1) - m) / (m * (m - 1))
    between = (sums * (sums.sum(0) - sums)).sum(1) / (m * m * (k - 1))
    return within, between


def variance_ratio(features: Float[Tensor, "k m d"]) -> tuple[float, float]:
    """Trace of the within-image over that of the between-image covariance, and its jackknife standard error.

    Both are defined in the module's text. NaN where all images have the same mean; the error also for 2 images.
    """
    features = features.double()
    k, m, _ = features.shape
    means = features.mean(1)
    within = (features - means[:, None]).square().sum((1, 2)) / (m - 1)
    deviations = (means - means.mean(0)).square().sum(1)
    # A spread that is rounding of the features themselves is none.
    if deviations.sum() <= k * (1e-6 * means.norm(dim=1).mean()) ** 2:
        return torch.nan, torch.nan
    ratio = (within.mean() / (deviations.sum() / (k - 1))).item()
    if k < 3:
        return ratio, torch.nan
    # Without image i the mean moves: the sum of squared deviations loses k/(k - 1) of its own.
    left = deviations.sum() - deviations * k / (k - 1)
    without = ((within.sum() - within) / (k - 1)) / (left / (k - 2))
    return ratio, ((k - 1) / k * (without - without.mean()).square().sum()).sqrt().item()


def draw(images: UInt8[Tensor, "k h w 3"], features: Float[Tensor, "k m d"], path: Path) -> None:
    """Write the matrix of cosine similarities of all views as PNG, each image beside its block; yellow is high."""
    k, m, _ = features.shape
    unit = torch.nn.functional.normalize(features.double(), dim=2).flatten(0, 1)
    matrix = (unit @ unit.T).cpu().numpy()
    figure = Figure(figsize=(6.4, 5.4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    drawn = axes.imshow(matrix, cmap="viridis", vmax=1.0, interpolation="nearest")
    for edge in range(1, k):
        axes.axhline(edge * m - 0.5, color="white", linewidth=0.4)
        axes.axvline(edge * m - 0.5, color="white", linewidth=0.4)
    for i, image in enumerate(images.cpu().numpy()):
        beside = axes.inset_axes((-0.9 / k, 1 - (i + 0.93) / k, 0.86 / k, 0.86 / k))
        beside.imshow(image, interpolation="nearest")
        beside.set_axis_off()
    axes.set_axis_off()
    axes.set_title(f"{k} images, {m} augmented views of each", fontsize=9)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.85)
    bar.set_label("cosine similarity", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=160)


def evaluate(subject: Subject, settings: Settings, output: Path) -> dict[str, Any]:
    """Similarities and the variance ratio, each with mean and standard error; the picture lies beside `output`.

    Raises ConfigError for settings that cannot be, CheckpointError where all images have the same features.
    """
    if settings.images < 2 or settings.augmentations < 2 or settings.chunk < 1:
        raise ConfigError("--images and --augmentations must be at least 2, --chunk at least 1")
    if not 1 <= settings.shown <= settings.images:
        raise ConfigError(f"--shown {settings.shown}: from 1 to --images {settings.images}")
    spec = augmentation(subject.config.views, settings.scenario)
    images, keys = subject.images(settings.images, option="--images")
    generator = torch.Generator().manual_seed(settings.seed)
    params = torch.stack([draw_photometric(spec, settings.augmentations, generator) for _ in keys]).to(images.device)
    features = embed_views(subject.model, images, params, settings.encoder, settings.chunk)
    within, between = similarities(features)
    ratio, error = variance_ratio(features)
    if features.isfinite().all() and ratio != ratio:
        raise CheckpointError(f"{subject.checkpoint}: all images have the same features; the model has collapsed")
    picture = output.with_suffix(".png")
    draw(images[: settings.shown], features[: settings.shown], picture)
    return {
        "images": settings.images,
        "augmentations": settings.augmentations,
        "encoder": settings.encoder,
        "within_image": over_images(within),
        "between_images": over_images(between),
        "variance_ratio": {"mean": ratio, "standard_error": None if settings.images < 3 else error},
        "picture": picture.name,
        "shown": keys[: settings.shown],
    }


FIGURES = {
    "within_image": "cosine similarity, views of one image",
    "between_images": "cosine similarity, views of two images",
    "variance_ratio": "variance within images / between images",
}
"""The figures of a result and what they are."""


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    made = Table(
        title=f"How much of an augmentation the {result['encoder']} keeps",
        caption=f"{result['images']} images, {result['augmentations']} views of each; see {result['picture']}",
        box=SIMPLE_HEAD,
    )
    for column in ("", "mean", "standard error"):
        made.add_column(column, justify="right" if column else "left")
    for name, words in FIGURES.items():
        score = result[name]
        error = "" if score["standard_error"] is None else f"{score['standard_error']:.4f}"
        made.add_row(words, f"{score['mean']:.4f}", error)
    return made

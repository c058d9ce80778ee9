"""Marginalised representations z_inv: mean of predictions over actions (paper, appendix H, figure S4, table S6).

From the features of a clean image the predictor computes those of N jittered views; their mean is z_inv. No image is
augmented and the encoder runs once. Actions are sampled per image from the bank's jitter, independently of the views in
the bank; a larger N reuses the actions of a smaller one. `null` is the single prediction with the action that changes
nothing. Features are those of the target encoder, averaged over tokens.

- Retrieval: rank of the clean image among it and its jittered views, by distance to z_inv, and jitter strength of the
  nearest views (`jitter_strength`). `copies` is the score of a perfect world model: the mean of the views' features.
- Linear accuracy: a linear classifier (logistic_regression.py) fitted on z_inv of training images and evaluated on
  z_inv of held-out images; `teacher` is the same with the target encoder's features. linear_accuracy.py bounds its
  memory for any number of images.

Without conditioning all predictions of an image are equal, so N changes nothing by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from rich.progress import track
from torch import Tensor

from dali_pipelines.augmentations import IDENTITY, JITTER_FIELDS, PhotometricConfig
from dali_pipelines.replay import sample_photometric
from dali_pipelines.seeds import derive_seed
from iwm.config import ConfigError
from iwm.evaluation.bank import TIE_TOLERANCE, actions_from, chance_mrr, check_changes, embed_bank
from iwm.evaluation.common import EvalContext, mean_and_stderr
from iwm.evaluation.figures import FigureTile, TileBlock, TileColumn, TileFigure, TileGroup, write_figures
from iwm.evaluation.held_out import MissingDataError, naming_command
from iwm.evaluation.linear_accuracy import PooledFeatures, linear_accuracy
from iwm.evaluation.paper_results import TABLE_S6
from iwm.evaluation.result_table import ResultTable, format_mean_stderr
from iwm.evaluation.settings import (
    MarginalisationSettings,
    bank_augmentation,
)
from iwm.models.world_model import WorldModel

NULL, COPIES, TEACHER = "null", "copies", "teacher"
"""Reference entries next to the numbers of predictions; see the module docstring."""

FIGURE_ROWS, FIGURE_COLUMNS = 3, 8
"""Images in the figure, and views of each."""


@dataclass(frozen=True)
class BankLookup:
    """Ranks and nearest views in one image's bank, for null, each number of predictions, and copies."""

    some: UInt8[Tensor, "c h w 3"]
    """Some of the views, for the figure."""
    nearest: UInt8[Tensor, "c h w 3"]
    """Views nearest to the last z_inv, nearest first."""
    found: NearestViews
    nearest_strength: Float[Tensor, " s"]
    random_strength: float


def evaluate(context: EvalContext, settings: MarginalisationSettings, output: Path) -> dict[str, Any]:
    """Compute retrieval and linear accuracy for each number of predictions; the figure shows some banks.

    Linear accuracy is left out where the data lack labels or a second split. Raises ConfigError for invalid settings,
    a given label or training split that does not exist, and fewer than two images.
    """
    _check(context, settings)
    numbers = tuple(map(str, settings.predictions))
    images, keys = context.first_images(settings.bank.num_images, at_least=2)
    linear, left_out = None, {}
    if settings.linear:
        try:
            folder = output.with_name(f"{output.stem}-features")
            linear = _linear(context, settings, (TEACHER, NULL, *numbers), folder)
        except MissingDataError as error:
            left_out["linear accuracy"] = naming_command(error, "marginalisation")
    generators = torch.Generator().manual_seed(settings.seed), _action_generator(settings.seed)
    banks = [_look_up(context, image, settings, *generators) for image in track(images, "banks", transient=True)]
    shown = dict(zip(keys[:FIGURE_ROWS], banks, strict=False))
    ranks = torch.stack([bank.found.ranks for bank in banks], dim=1).double()
    nearest = torch.stack([bank.nearest_strength for bank in banks], dim=1).double()
    names = (NULL, *numbers, COPIES)
    return {
        "images": len(banks),
        "bank": settings.bank.num_views,
        "predictions": list(settings.predictions),
        "clean": {
            "chance": chance_mrr(settings.bank.num_views + 1),
            "reciprocal_rank": dict(zip(names, map(mean_and_stderr, 1 / ranks), strict=True)),
            "nearest": dict(zip(names, map(mean_and_stderr, (ranks == 1).double()), strict=True)),
        },
        "strength": {
            "views_averaged": settings.nearest,
            "of_nearest": dict(zip(names, map(mean_and_stderr, nearest), strict=True)),
            "of_random": mean_and_stderr(torch.tensor([bank.random_strength for bank in banks], dtype=torch.float64)),
        },
        "linear": linear,
        "left_out": left_out,
        "paper": {str(n): TABLE_S6[n] for n in settings.predictions if n in TABLE_S6},
        **write_figures([figure(shown, settings.predictions[-1])], output),
    }


def _check(context: EvalContext, settings: MarginalisationSettings) -> None:
    sizes, bank = settings.predictions, settings.bank
    if not sizes or list(sizes) != sorted(set(sizes)):
        raise ConfigError(
            f"--predictions {' '.join(map(str, sizes))}: give ascending numbers from 1, for example 1 8 16 32 128"
        )
    if settings.nearest > bank.num_views:
        raise ConfigError(f"--nearest {settings.nearest}: must be from 1 to --bank.num-views {bank.num_views}")
    check_changes(bank_augmentation(context.config.views, bank.scenario))


def _action_generator(seed: int) -> torch.Generator:
    """Return a generator for actions. The banks' own generator would make the actions equal to the bank's views."""
    return torch.Generator().manual_seed(derive_seed(seed, 1, bits=32))


@torch.no_grad()
def _look_up(
    context: EvalContext,
    image: UInt8[Tensor, "h w 3"],
    settings: MarginalisationSettings,
    views_generator: torch.Generator,
    actions_generator: torch.Generator,
) -> BankLookup:
    model, bank = context.model, settings.bank
    jitter = bank_augmentation(context.config.views, bank.scenario)
    params = sample_photometric(jitter, bank.num_views, views_generator).to(image.device)
    clean, embedded = image[None], embed_bank(model, image, params, bank.batch_size)
    views, targets = embedded.views, embedded.targets.mean(1)
    marginals = _marginals(context, clean, jitter, settings, actions_generator)[0]
    found = nearest_views(
        model.target_features(clean).float().mean(1)[0], targets, torch.cat([marginals, targets.mean(0, keepdim=True)])
    )
    strength = jitter_strength(params, jitter)
    # Nearest views without the clean image, whose strength is 0 and whose rank is reported separately.
    jittered = found.order[found.order > 0].view(len(found.order), -1) - 1
    near = strength[jittered[:, : settings.nearest]].mean(1)
    shown = torch.cat([clean, views])[found.order[-2, :FIGURE_COLUMNS]]
    return BankLookup(views[:FIGURE_COLUMNS].cpu(), shown.cpu(), found, near, strength.mean().item())


@torch.no_grad()
def _marginals(
    context: EvalContext,
    images: UInt8[Tensor, "b h w 3"],
    jitter: PhotometricConfig,
    settings: MarginalisationSettings,
    generator: torch.Generator,
) -> Float[Tensor, "b s d"]:
    """Return pooled predictions of clean images: with the null action, then z_inv for each number of predictions."""
    features = context.model.encode(images, "teacher")
    # Sample image by image, so that the actions of an image do not depend on the batch size.
    params = torch.stack([sample_photometric(jitter, max(settings.predictions), generator) for _ in images])
    nothing = torch.tensor(IDENTITY, device=images.device).expand(len(images), 1, -1)
    null = average_predictions(context.model, features, nothing, (1,), settings.bank.batch_size)
    several = average_predictions(
        context.model, features, params.to(images.device), settings.predictions, settings.bank.batch_size
    )
    return torch.cat([null, several], dim=1)


def _linear(
    context: EvalContext, settings: MarginalisationSettings, names: Sequence[str], folder: Path
) -> dict[str, Any]:
    jitter = bank_augmentation(context.config.views, settings.bank.scenario)
    generator = _action_generator(settings.seed)

    def compute(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        plain = context.model.encode(images, "teacher").float().mean(1, keepdim=True)
        return torch.cat([plain, _marginals(context, images, jitter, settings, generator)], dim=1)

    identity = {"predictions": settings.predictions, "jitter": asdict(jitter), "precision": settings.precision}
    features = PooledFeatures(names, compute, generator, identity)
    return linear_accuracy(context, settings.probe, features, settings.seed, folder)


def figure(shown: Mapping[str, BankLookup], predictions: int) -> TileFigure:
    """Return the figure: for each image, by key, some of its views and the views nearest to the last z_inv."""
    groups = []
    for key, bank in shown.items():
        places = bank.found.order[-2].tolist()
        columns = []
        for i, (view, near) in enumerate(zip(bank.some, bank.nearest, strict=False)):
            clean = places[i] == 0
            kind = "the clean image" if clean else "a jittered view"
            tiles = (
                FigureTile(view, f"photograph {key}: one of its views"),
                FigureTile(near, f"photograph {key}: number {i + 1} nearest to z_inv, {kind}", marked=clean),
            )
            columns.append(TileColumn(f"{i + 1}", tiles))
        groups.append(TileGroup(key, [TileBlock("", columns, rows=("some views", "nearest to z_inv"))]))
    caption = (
        "Some jittered views of an image; below them the views nearest to z_inv, the mean of "
        f"{predictions} predictions, nearest first. The mean leaves out what the actions change, so the clean image "
        "should be near."
    )
    return TileFigure("Views nearest to the mean prediction", caption, groups, mark="the clean image")


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the result in the shape of table S6, one column per N, with the paper's row."""
    names = [*map(str, result["predictions"]), NULL]

    def line(words: str, scores: dict[str, dict[str, float]], times: float, digits: int, key: str) -> list[str]:
        return [words, *(f"{times * scores[column][key]:.{digits}f}" for column in names)]

    clean, strength, linear = result["clean"], result["strength"], result["linear"]
    rows = []
    if linear is not None:
        rows.append(line("linear accuracy, %", linear["accuracy"], 100, 1, "mean"))
        rows.append(line("± standard error", linear["accuracy"], 100, 1, "standard_error"))
        rows.append(["paper, ImageNet", *(f"{result['paper'].get(column, '')}" for column in names)])
    rows.append(line("clean image, 1/rank", clean["reciprocal_rank"], 1, 2, "mean"))
    rows.append(line("± standard error", clean["reciprocal_rank"], 1, 2, "standard_error"))
    rows.append(line("clean image nearest, %", clean["nearest"], 100, 0, "mean"))
    rows.append(line("jitter strength of nearest", strength["of_nearest"], 1, 2, "mean"))
    title = "Means of N predictions ± standard error"
    return [ResultTable(title, ["predictions (N)", *names], rows, _caption(result))]


def _caption(result: dict[str, Any]) -> str:
    clean, strength, linear = result["clean"], result["strength"], result["linear"]
    perfect = format_mean_stderr(clean["reciprocal_rank"][COPIES], 2)
    text = (
        f"Retrieval among {result['bank']} jittered views and the clean image, {result['images']} images. 1/rank: "
        f"chance {clean['chance']:.3f}, mean of the views' features {perfect}. Jitter strength (0 to 1): mean of the "
        f"{strength['views_averaged']} nearest views; of a random view {strength['of_random']['mean']:.2f}."
    )
    if linear is None:
        return text
    return (
        f"{text} Linear accuracy: '{linear['label']}', {linear['classes']} classes, {linear['train_images']} training "
        f"and {linear['val_images']} held-out images; target encoder's features "
        f"{format_mean_stderr(linear['accuracy'][TEACHER], 1, 100)}, chance (majority class) "
        f"{100 * linear['chance']:.1f}."
    )


@torch.no_grad()
def average_predictions(
    model: WorldModel,
    features: Float[Tensor, "b n d"],
    params: Float[Tensor, "b k p"],
    sizes: Sequence[int],
    batch_size: int = 256,
) -> Float[Tensor, "b s d"]:
    """Compute the pooled z_inv of each image for each of `sizes`, the mean of its first `size` predictions; float32.

    `features`: features of whole clean images. `params`: target parameters of each prediction (PHOTOMETRIC_FIELDS).
    `batch_size`: predictions computed at a time.
    """
    b, k, _ = params.shape
    actions = actions_from(params.flatten(0, 1), model.action_spec)
    rows = torch.arange(b * k, device=params.device).split(batch_size)
    pooled = torch.cat([model.predict(features[part // k], actions[part]).float().mean(1) for part in rows])
    sums = pooled.unflatten(0, (b, k)).cumsum(1)
    return torch.stack([sums[:, size - 1] / size for size in sizes], dim=1)


def jitter_strength(params: Float[Tensor, "k p"], jitter: PhotometricConfig) -> Float[Tensor, " k"]:
    """Return the jitter strength of each view: 0 no change, 1 the largest change of every parameter in `jitter`."""
    most = torch.tensor(jitter.strengths, device=params.device)
    change = (params - torch.tensor(IDENTITY, device=params.device))[:, : len(JITTER_FIELDS)].abs()
    return (change[:, most > 0] / most[most > 0]).mean(1)


@dataclass(frozen=True)
class NearestViews:
    """Retrieval with the z_inv of one image, in its bank of the clean image and k views."""

    ranks: Float[Tensor, " s"]
    """Rank of the clean image among k + 1, from 1; ties share their mean rank."""
    order: Int64[Tensor, "s k1"]
    """Bank indices, nearest first: 0 is the clean image, i is view i - 1."""


def nearest_views(
    clean: Float[Tensor, " d"], views: Float[Tensor, "k d"], queries: Float[Tensor, "s d"]
) -> NearestViews:
    """Rank the bank of the clean image and its views by Euclidean distance to each query."""
    bank = torch.cat([clean[None], views]).double()
    distances = torch.linalg.vector_norm(queries.double()[:, None] - bank, dim=2)
    true = distances[:, :1]
    tolerance = TIE_TOLERANCE * bank[0].norm()
    nearer = (distances < true - tolerance).sum(1)
    tied = ((distances - true).abs() <= tolerance).sum(1)
    return NearestViews(nearer + (tied + 1) / 2, distances.argsort(dim=1, stable=True))

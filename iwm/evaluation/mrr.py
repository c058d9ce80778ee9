"""Mean reciprocal rank: can the predictor apply an action in latent space (paper, section 4.1)?

Of one clean image a bank of jittered copies is made, which the target encoder embeds. The clean image's features go
through the predictor with each copy's action; the rank of the true copy among the bank, by distance to the
prediction, is 1 if the world model did exactly what the action says. Chance for a bank of 256 is H(256)/256 = 0.0239.

Measured four ways: features averaged over tokens (`pooled`) or whole (`per_token`), the clean image through the
target encoder (`teacher`) or the context encoder (`student`). The control is in the same shape: the prediction made
with another copy's action, each action used once and none in its place. It needs no further predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro
from jaxtyping import Float, Int, UInt8
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dali_pipelines.augmentation import SCENARIOS, Photometric, Views
from dali_pipelines.replay import draw_photometric
from iwm.config import ConfigError
from iwm.evaluation.bank import CONTEXTS, DISTANCES, actions_to, embed_bank, predicted_distances
from iwm.evaluation.over_images import over_images
from iwm.evaluation.settings import Settings as Common

if TYPE_CHECKING:
    from iwm.evaluation.subject import Subject
    from iwm.models.world_model import WorldModel

JITTERED = tuple(name for name, views in SCENARIOS.items() if views.target.jitter_probability > 0)
"""The scenarios whose target jitter can fill a bank."""

LEAST_FACTOR = 0.1
"""Where a strength allows a factor of 0, grids of single values begin here: a black view says nothing."""

TIE = 1e-6
"""Distances that differ by less than this share of the true copy's norm are ties: float32 cannot tell them apart."""


@dataclass(frozen=True)
class BankSettings:
    """The bank that ranks are taken in."""

    images: int = 64
    """Held-out images, each with a bank of its own; the standard error is over them."""
    size: int = 256
    """Jittered copies per image, at least 2. Chance depends on it: compare only scores of one size."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(JITTERED))] = None
    """Row of table S2 whose target jitter fills the bank, the same for runs that are compared. Default: the run's own
    jitter, or that of `default` where it has none."""
    chunk: int = 256
    """Copies embedded and predicted at once; lower it when the device runs out of memory."""


@dataclass(frozen=True)
class Settings(Common):
    """Mean reciprocal rank: can the predictor apply an action in latent space?"""

    bank: BankSettings = field(default_factory=BankSettings)


def bank_jitter(views: Views, scenario: str | None = None) -> Photometric:
    """The jitter that fills the bank: a target's jitter, always applied, nothing destructive.

    At training's p = 0.8 a fifth of the bank would be the clean image itself, and ties would decide the score.
    Raises ConfigError for an unknown scenario or one whose target has no jitter.
    """
    if scenario is not None and scenario not in JITTERED:
        raise ConfigError(f"--bank.scenario: '{scenario}' is no scenario with jitter; choose one of {JITTERED}")
    own = views.target if views.target.jitter_probability > 0 else SCENARIOS["default"].target
    target = own if scenario is None else SCENARIOS[scenario].target
    return replace(target.without_destructive(), jitter_probability=1.0)


@dataclass(frozen=True)
class Ranks:
    """The rank of every copy among its bank, 1 the nearest. Axes 0 and 1 follow DISTANCES and CONTEXTS."""

    actions: Float[Tensor, "distance context images k"]
    shuffled_actions: Float[Tensor, "distance context images k"]
    """The same when the prediction was made with another copy's action."""


@torch.no_grad()
def measure(
    model: WorldModel,
    images: UInt8[Tensor, "b h w 3"],
    settings: BankSettings,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Ranks:
    """Rank every copy of every image. `images` are clean views of the run's size, on the model's device.

    All of `images` are taken (`settings.images` is the caller's). The banks depend on `seed` and the settings, not on
    the model, so that two models are asked the same questions.
    """
    generator = torch.Generator().manual_seed(seed)
    jitter = bank_jitter(model.config.views, settings.scenario)
    actions, shuffled = [], []
    for i in progress(range(len(images))):
        params = draw_photometric(jitter, settings.size, generator).to(images.device)
        other = derangement(settings.size, generator).to(images.device)
        bank = embed_bank(model, images[i], params, settings.chunk)
        told = actions_to(params, model.action_spec)[None]
        distances = predicted_distances(model, bank, images[i : i + 1], told, chunk=settings.chunk)[:, :, 0]
        actions.append(rank(distances, bank.norms))
        shuffled.append(rank(distances[..., other, :], bank.norms))
    return Ranks(torch.stack(actions, dim=2), torch.stack(shuffled, dim=2))


def derangement(size: int, generator: torch.Generator) -> Int[Tensor, " size"]:
    """A random permutation that leaves nothing in its place (one cycle through all, size at least 2)."""
    order = torch.randperm(size, generator=generator)
    permutation = torch.empty_like(order)
    permutation[order] = order.roll(1)
    return permutation


def rank(
    distances: Float[Tensor, "distance context q k"], norms: Float[Tensor, "distance k"]
) -> Float[Tensor, "distance context q"]:
    """Rank of entry i in row i, from 1; entries as near as the true one (see TIE) share their mean rank.

    Of the k entries the first q are asked for. NaN where the distances are not finite, so that a broken model cannot
    look good.
    """
    true = distances.diagonal(dim1=-2, dim2=-1)[..., None]
    tolerance = TIE * norms[:, None, : distances.shape[-2], None]
    nearer = (distances < true - tolerance).sum(-1)
    tied = ((distances - true).abs() <= tolerance).sum(-1)
    ranks = nearer + (tied + 1) / 2
    return ranks.masked_fill(~distances.isfinite().all(-1), torch.nan)


def chance(size: int) -> float:
    """The mean reciprocal rank of guessing in a bank of `size`: H(size) / size."""
    return sum(1 / i for i in range(1, size + 1)) / size


def summarise(ranks: Ranks) -> dict[str, Any]:
    """The contract's figures: `chance`, `images`, `bank`, `mrr`, `shuffled_actions`, `recall`.

    Each score is `{"mean", "standard_error"}` under `[distance][context]`; the copies of one image share its
    difficulty, so images are the independent units of the standard error (NaN for a single image).
    """
    images, size = ranks.actions.shape[2:]
    return {
        "chance": chance(size),
        "images": images,
        "bank": size,
        "mrr": _scores(1 / ranks.actions),
        "shuffled_actions": _scores(1 / ranks.shuffled_actions),
        "recall": {f"at_{k}": _scores((ranks.actions <= k).float()) for k in (1, 5)},
    }


def _scores(values: Float[Tensor, "distance context images k"]) -> dict[str, dict[str, dict[str, float]]]:
    per_image = values.double().mean(-1)
    return {
        distance: {context: over_images(per_image[i, j]) for j, context in enumerate(CONTEXTS)}
        for i, distance in enumerate(DISTANCES)
    }


def evaluate(subject: Subject, settings: Settings, output: Path) -> dict[str, Any]:
    """The figures of `summarise` on the subject's held-out images. Raises ConfigError for a bank that cannot be."""
    bank = settings.bank
    if bank.images < 2 or bank.size < 2 or bank.chunk < 1:
        raise ConfigError("--bank: images and size must be at least 2 and chunk at least 1")
    bank_jitter(subject.config.views, bank.scenario)
    images, _ = subject.images(bank.images)
    ranks = measure(subject.model, images, bank, settings.seed, lambda steps: track(steps, "banks", transient=True))
    return summarise(ranks)


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    made = Table(
        title="Mean reciprocal rank ± standard error",
        caption=f"{result['images']} images, bank of {result['bank']}; chance {result['chance']:.4f}",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    parts = {
        "MRR": result["mrr"],
        "shuffled": result["shuffled_actions"],
        "Recall@1": result["recall"]["at_1"],
        "Recall@5": result["recall"]["at_5"],
    }
    for column in ("distance", "encoder", *parts):
        made.add_column(column, justify="right" if column in parts else "left", no_wrap=True)
    for distance in DISTANCES:
        for context in CONTEXTS:
            scores = [part[distance][context] for part in parts.values()]
            cells = [f"{score['mean']:.3f}±{score['standard_error']:.3f}" for score in scores]
            made.add_row(distance.replace("_", " "), context, *cells)
    return made

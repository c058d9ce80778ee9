"""Retrieval figures: nearest view to each prediction (paper, section 4.3, figures 1 and S5 to S8).

The predictor applies an action to the target encoder's features of an image. The figure shows the view of the
bank that is nearest to the prediction, next to the true view. Images and actions are random. A second figure shows the
best and worst prediction of each image.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dali_pipelines.augmentations import PhotometricConfig
from dali_pipelines.replay import apply_photometric, sample_photometric
from iwm.actions import describe_action
from iwm.config import ConfigError
from iwm.evaluation.bank import UNCONDITIONED_NOTE, actions_from, embed_bank, predicted_distances, rank_of_target
from iwm.evaluation.common import EvalContext
from iwm.evaluation.result_table import ResultTable
from iwm.evaluation.settings import BankSettings, RetrievalSettings, bank_augmentation
from iwm.models.world_model import WorldModel

EXTREMES = ("best", "worst")


@dataclass(frozen=True)
class Retrieval:
    """One prediction: its nearest view and its true view."""

    action: str
    rank: float
    """Rank of the true view, from 1."""
    retrieved: UInt8[Tensor, "h w 3"]
    truth: UInt8[Tensor, "h w 3"]
    label: str = ""
    """`best` or `worst`; empty for a random action."""


@dataclass(frozen=True)
class Row:
    """One image and its retrievals."""

    key: str
    source: UInt8[Tensor, "h w 3"]
    retrievals: list[Retrieval]


@dataclass(frozen=True)
class _ImagePredictions:
    """Ranks and nearest views of one image for all actions of its bank. Shown views are computed again."""

    key: str
    image: UInt8[Tensor, "h w 3"]
    params: Float[Tensor, "k p"]
    ranks: Float[Tensor, " k"]
    nearest: Int[Tensor, " k"]
    missed_by: Float[Tensor, " k"]
    """Distance from the prediction to the true view, which decides between equal ranks."""

    def row(self, model: WorldModel, indices: Sequence[int], labels: Sequence[str]) -> Row:
        colour, index = model.config.views.jitter_impl, torch.tensor(indices, device=self.image.device)
        actions = actions_from(self.params[index], model.action_spec)
        sources = self.image.expand(len(indices), -1, -1, -1)
        truth, retrieved = (
            apply_photometric(sources, self.params[i], colour).cpu() for i in (index, self.nearest[index])
        )
        retrievals = [
            Retrieval(
                describe_action(actions[i], model.action_spec), self.ranks[k].item(), retrieved[i], truth[i], label
            )
            for i, (k, label) in enumerate(zip(indices, labels, strict=True))
        ]
        return Row(self.key, self.image.cpu(), retrievals)

    def extremes(self) -> list[int]:
        """Return the indices of the best and the worst prediction; distance decides between equal ranks."""
        order = sorted(range(len(self.ranks)), key=lambda i: (self.ranks[i].item(), self.missed_by[i].item()))
        return [order[0], order[-1]]


@torch.no_grad()
def retrieve(context: EvalContext, settings: RetrievalSettings) -> tuple[list[Row], list[Row]]:
    """Sample images and actions with the seed, and retrieve the nearest view of every prediction.

    Returns one row per image with the sampled actions, and one with the best and worst prediction of its bank.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    images, keys = context.random_images(settings.bank.num_images, generator)
    jitter = bank_augmentation(context.config.views, settings.bank.scenario)
    predictions = [
        _predict_image(context.model, image, key, jitter, settings.bank, generator)
        for image, key in zip(images, keys, strict=True)
    ]
    model = context.model
    random_rows = [item.row(model, range(settings.num_actions), [""] * settings.num_actions) for item in predictions]
    return random_rows, [item.row(model, item.extremes(), EXTREMES) for item in predictions]


def _predict_image(
    model: WorldModel,
    image: UInt8[Tensor, "h w 3"],
    key: str,
    jitter: PhotometricConfig,
    settings: BankSettings,
    generator: torch.Generator,
) -> _ImagePredictions:
    params = sample_photometric(jitter, settings.num_views, generator).to(image.device)
    bank = embed_bank(model, image, params, settings.batch_size)
    actions = actions_from(params, model.action_spec)[None]
    distances = predicted_distances(
        model, bank, image[None], actions, distances=("pooled",), encoders=("teacher",), batch_size=settings.batch_size
    )[:, :, 0]
    ranks = rank_of_target(distances, bank.norms[:1])[0, 0]
    return _ImagePredictions(key, image, params, ranks, distances[0, 0].argmin(dim=1), distances[0, 0].diagonal())


def draw(rows: list[Row], bank: int, path: Path) -> None:
    """Write the figure as PNG, one row per image with the retrieved and the true view of each action."""
    actions = len(rows[0].retrievals)
    figure = Figure(
        figsize=(1.3 * (1 + 2.25 * actions), 1.95 * len(rows) + 0.2), layout="constrained", facecolor="white"
    )
    widths = [1.0, *([0.15, 1.0, 1.0] * actions)]
    axes = figure.subplots(len(rows), len(widths), squeeze=False, width_ratios=widths)
    for ax in axes.flat:
        ax.set_axis_off()
    for line, row in zip(axes, rows, strict=True):
        _show(line[0], row.source, "image")
        for a, retrieval in enumerate(row.retrievals):
            _show(line[3 * a + 2], retrieval.retrieved, "retrieved")
            _show(line[3 * a + 3], retrieval.truth, "true view")
            label = f"{retrieval.label} of {bank} predictions\n" if retrieval.label else ""
            words = f"{label}{textwrap.fill(retrieval.action, 40)}\nrank {retrieval.rank:g} of {bank}"
            line[3 * a + 2].set_title(words, fontsize=7, loc="left", linespacing=1.3)
    figure.savefig(path, dpi=160)


def _show(ax: Axes, image: UInt8[Tensor, "h w 3"], caption: str) -> None:
    ax.imshow(image.numpy(), interpolation="nearest")
    ax.text(0.5, -0.04, caption, transform=ax.transAxes, ha="center", va="top", fontsize=7, color="0.35")


def evaluate(context: EvalContext, settings: RetrievalSettings, output: Path) -> dict[str, Any]:
    """Draw the figures next to `output`; return the keys, actions and ranks that they show.

    Raises ConfigError for invalid settings.
    """
    if settings.num_actions > settings.bank.num_views:
        raise ConfigError(
            f"--num-actions {settings.num_actions}: must be from 1 to --bank.num-views {settings.bank.num_views}"
        )
    chosen, extremes = retrieve(context, settings)
    picture, picture_of_extremes = output.with_suffix(".png"), output.with_name(f"{output.stem}-extremes.png")
    draw(chosen, settings.bank.num_views, picture)
    draw(extremes, settings.bank.num_views, picture_of_extremes)
    return {
        "bank": settings.bank.num_views,
        "conditioning": context.config.action.conditioning,
        "picture": picture.name,
        "photographs": [_record(row) for row in chosen],
        "extremes": {"picture": picture_of_extremes.name, "photographs": [_record(row) for row in extremes]},
    }


def _record(row: Row) -> dict[str, Any]:
    shown = [{"action": r.action, "rank": r.rank} | ({"label": r.label} if r.label else {}) for r in row.retrievals]
    return {"key": row.key, "actions": shown}


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the ranks of the random actions, then of each image's best and worst."""
    extremes = result["extremes"]
    rows = []
    for row in (*result["photographs"], *extremes["photographs"]):
        for i, shown in enumerate(row["actions"]):
            label = f"{shown['label']} of {result['bank']}" if "label" in shown else f"random, seed {result['seed']}"
            rows.append(["" if i else row["key"], label, shown["action"], f"{shown['rank']:g}"])
    title = f"Retrieval in a bank of {result['bank']} views: {result['picture']} and {extremes['picture']}"
    caption = UNCONDITIONED_NOTE if result["conditioning"] == "none" else ""
    return [ResultTable(title, ["image", "selection", "action", "rank of the true view"], rows, caption)]

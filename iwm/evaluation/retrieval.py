"""Retrieval figures: nearest view to each prediction (paper, section 4.3, figures 1 and S5 to S8).

The predictor applies an action to the target encoder's features of an image. The figure shows the view of the
bank that is nearest to the prediction, next to the true view. Images and actions are random. A second figure shows the
best and worst prediction of each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dali_pipelines.augmentations import PhotometricConfig
from dali_pipelines.replay import apply_photometric, sample_photometric
from iwm.actions import describe_action
from iwm.config import ConfigError
from iwm.evaluation.bank import (
    UNCONDITIONED_NOTE,
    actions_from,
    chance_mrr,
    embed_bank,
    predicted_distances,
    rank_of_target,
)
from iwm.evaluation.common import EvalContext
from iwm.evaluation.figures import FigureTile, TileBlock, TileColumn, TileFigure, TileGroup, write_figures
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
    retrieved_action: str
    """Action that leads to the retrieved view."""
    truth: UInt8[Tensor, "h w 3"]
    hit: bool
    """True where the retrieved view is the true one."""
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
        sources = self.image.expand(len(indices), -1, -1, -1)
        true, near = self.params[index], self.params[self.nearest[index]]
        truth, retrieved = (apply_photometric(sources, params, colour).cpu() for params in (true, near))
        true_words, near_words = (
            [describe_action(action, model.action_spec) for action in actions_from(params, model.action_spec)]
            for params in (true, near)
        )
        retrievals = [
            Retrieval(
                action=true_words[i],
                rank=self.ranks[k].item(),
                retrieved=retrieved[i],
                retrieved_action=near_words[i],
                truth=truth[i],
                hit=self.nearest[k].item() == k,
                label=label,
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


def figure(rows: Sequence[Row], bank: int, title: str, caption: str, folded: bool = False) -> TileFigure:
    """Return the figure: for each image the photograph and, for each action, the retrieved and the true view."""
    groups = []
    for row in rows:
        photograph = TileBlock("", [TileColumn("photograph", (FigureTile(row.source, f"photograph {row.key}"),))])
        blocks = [_block(row.key, retrieval, bank) for retrieval in row.retrievals]
        groups.append(TileGroup(row.key, [photograph, *blocks]))
    mark = "the view nearest to the prediction is the true view"
    return TileFigure(title, caption, groups, mark=mark, tile_width=96, folded=folded)


def _block(key: str, retrieval: Retrieval, bank: int) -> TileBlock:
    rank = f"rank {retrieval.rank:g} of {bank}"
    nearest = f"photograph {key}, {retrieval.action}: view nearest to the prediction, " + (
        "which is the true view" if retrieval.hit else f"{retrieval.retrieved_action}; the true view has {rank}"
    )
    truth = f"photograph {key}, {retrieval.action}: true view, {rank}"
    columns = [
        TileColumn("nearest", (FigureTile(retrieval.retrieved, nearest, marked=retrieval.hit),)),
        TileColumn("true view", (FigureTile(retrieval.truth, truth),)),
    ]
    selection = f"{retrieval.label} of {bank} predictions: " if retrieval.label else ""
    # Lines break between the parts of an action, not inside 'hue -18°'.
    action = ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in retrieval.action.split(", "))
    return TileBlock("", columns, notes=(f"{selection}{action}", f"true view: {rank}"))


def evaluate(context: EvalContext, settings: RetrievalSettings, output: Path) -> dict[str, Any]:
    """Return the keys, actions and ranks of all retrievals, and the figures that show them.

    Raises ConfigError for invalid settings.
    """
    bank = settings.bank.num_views
    if settings.num_actions > bank:
        raise ConfigError(f"--num-actions {settings.num_actions}: must be from 1 to --bank.num-views {bank}")
    chosen, extremes = retrieve(context, settings)
    unconditioned = context.config.action.conditioning == "none"
    caption = (
        f"The photograph; then, for each action, the view nearest to the prediction, among {bank} jittered views, and "
        f"the true view. Images and actions are random (seed {settings.seed})."
    )
    figures = [
        figure(chosen, bank, "Retrieved views", f"{caption} {UNCONDITIONED_NOTE}" if unconditioned else caption),
        figure(
            extremes,
            bank,
            "Best and worst prediction of each image",
            f"Not random: the best and the worst of all {bank} predictions for each of these images.",
            folded=True,
        ),
    ]
    return {
        "bank": bank,
        "chance": chance_mrr(bank),
        "conditioning": context.config.action.conditioning,
        "photographs": [_record(row) for row in chosen],
        "extremes": [_record(row) for row in extremes],
        **write_figures(figures, output),
    }


def _record(row: Row) -> dict[str, Any]:
    shown = [{"action": r.action, "rank": r.rank} | ({"label": r.label} if r.label else {}) for r in row.retrievals]
    return {"key": row.key, "actions": shown}


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the ranks of the random actions, then of each image's best and worst."""
    rows = []
    for row in (*result["photographs"], *result["extremes"]):
        for i, shown in enumerate(row["actions"]):
            label = f"{shown['label']} of {result['bank']}" if "label" in shown else f"random, seed {result['seed']}"
            rows.append(["" if i else row["key"], label, shown["action"], f"{shown['rank']:g}"])
    title = f"Retrieval in a bank of {result['bank']} views"
    caption = UNCONDITIONED_NOTE if result["conditioning"] == "none" else ""
    return [ResultTable(title, ["image", "selection", "action", "rank of the true view"], rows, caption)]

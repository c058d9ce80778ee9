"""Mean reciprocal rank (MRR) of predictions in a bank of augmented views (paper, section 4.1).

The bank holds the target encoder's features of jittered views of one clean image. The predictor receives the clean
image's features and the action to one view. The rank of that view, by distance to the prediction, is 1 for a perfect
world model. Chance for a bank of 256 is H(256)/256 = 0.0239.

There are four variants: features averaged over tokens (`pooled`) or `per_token`, and the clean image through the target
encoder (`teacher`) or the context encoder (`student`). The control `shuffled_actions` uses another view's action for
each prediction, by a permutation without fixed points. It needs no further predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from rich.progress import track
from torch import Tensor

from dali_pipelines.augmentations import JitterImpl, PhotometricConfig
from dali_pipelines.replay import sample_photometric
from iwm.encoder_outputs import ENCODERS
from iwm.evaluation.bank import actions_from, chance_mrr, derangement, embed_bank, predicted_distances, rank_of_target
from iwm.evaluation.common import EvalContext, mean_and_stderr
from iwm.evaluation.result_table import ResultTable, format_mean_stderr
from iwm.evaluation.settings import DISTANCES, BankSettings, MRRSettings, bank_augmentation, jitter_by_op
from iwm.models.world_model import WorldModel


@dataclass(frozen=True)
class Ranks:
    """Rank of every view in its bank, from 1. Axes 0 and 1 follow DISTANCES and ENCODERS."""

    actions: Float[Tensor, "distance encoder images k"]
    shuffled_actions: Float[Tensor, "distance encoder images k"]
    """Ranks of predictions with another view's action."""


@torch.no_grad()
def compute_ranks(
    model: WorldModel,
    images: UInt8[Tensor, "b h w 3"],
    settings: BankSettings,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    jitter_impl: JitterImpl | None = None,
    jitter: PhotometricConfig | None = None,
) -> Ranks:
    """Rank every view of every image. `images` are clean views of the run's size, on the model's device.

    All of `images` are used; `settings.num_images` is ignored. Banks depend on `seed` and `settings` and not on the
    model, so that all models are evaluated on the same banks. jitter_impl: computation of their jitter; None: the
    model's own. jitter: settings that the views are sampled from; None: those of `settings.scenario`.
    """
    generator = torch.Generator().manual_seed(seed)
    sampled = jitter or bank_augmentation(model.config.views, settings.scenario)
    actions, shuffled = [], []
    for i in progress(range(len(images))):
        params = sample_photometric(sampled, settings.num_views, generator).to(images.device)
        other = derangement(settings.num_views, generator).to(images.device)
        bank = embed_bank(model, images[i], params, settings.batch_size, jitter_impl)
        queries = actions_from(params, model.action_spec)[None]
        distances = predicted_distances(model, bank, images[i : i + 1], queries, batch_size=settings.batch_size)[
            :, :, 0
        ]
        actions.append(rank_of_target(distances, bank.norms))
        shuffled.append(rank_of_target(distances[..., other, :], bank.norms))
    return Ranks(torch.stack(actions, dim=2), torch.stack(shuffled, dim=2))


def summarise(ranks: Ranks) -> dict[str, Any]:
    """Return the scores of mrr.json: `chance`, `images`, `bank`, `mrr`, `shuffled_actions`, `recall`.

    Each score is `{"mean", "standard_error"}` under `[distance][encoder]`. The views of one image share its difficulty,
    so the standard error is over images (NaN for a single image).
    """
    images, size = ranks.actions.shape[2:]
    return {
        "chance": chance_mrr(size),
        "images": images,
        "bank": size,
        "mrr": _scores(1 / ranks.actions),
        "shuffled_actions": _scores(1 / ranks.shuffled_actions),
        "recall": {f"at_{k}": _scores((ranks.actions <= k).float()) for k in (1, 5)},
    }


def _scores(values: Float[Tensor, "distance encoder images k"]) -> dict[str, dict[str, dict[str, float]]]:
    per_image = values.double().mean(-1)
    return {
        distance: {encoder: mean_and_stderr(per_image[i, j]) for j, encoder in enumerate(ENCODERS)}
        for i, distance in enumerate(DISTANCES)
    }


def evaluate(context: EvalContext, settings: MRRSettings, output: Path) -> dict[str, Any]:
    """Return the scores of `summarise`. Raises ConfigError for invalid bank settings and fewer than two images."""
    bank = settings.bank
    jitter = bank_augmentation(context.config.views, bank.scenario)
    images, _ = context.first_images(bank.num_images, at_least=2)

    def measured(sampled: PhotometricConfig, title: str) -> dict[str, Any]:
        def progress(steps: Iterable[int]) -> Iterable[int]:
            return track(steps, title, transient=True)

        return summarise(
            compute_ranks(context.model, images, bank, settings.seed, progress, settings.jitter_impl, sampled)
        )

    result = measured(jitter, "banks")
    if settings.by_op:
        result["by_op"] = {op: measured(alone, f"banks of {op}") for op, alone in jitter_by_op(jitter).items()}
    return result


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return MRR with its control and recall, one row per distance and encoder; then of each op alone, if measured."""
    parts = {
        "MRR": result["mrr"],
        "shuffled actions": result["shuffled_actions"],
        "Recall@1": result["recall"]["at_1"],
        "Recall@5": result["recall"]["at_5"],
    }
    rows = [
        [way_name(distance, encoder), *(format_mean_stderr(part[distance][encoder]) for part in parts.values())]
        for distance, encoder in WAYS
    ]
    caption = f"{result['images']} images, bank of {result['bank']} views; chance {result['chance']:.4f}"
    found = [ResultTable("Mean reciprocal rank ± standard error", ["distance, encoder", *parts], rows, caption)]
    if "by_op" in result:
        found.append(_table_by_op(result["by_op"], caption))
    return found


def _table_by_op(by_op: dict[str, Any], caption: str) -> ResultTable:
    rows = [
        [op, *(format_mean_stderr(scores[part][distance]["teacher"]) for distance in DISTANCES for part in _BY_OP)]
        for op, scores in by_op.items()
    ]
    columns = [f"{part}{distance.replace('_', ' ')}" for distance in DISTANCES for part in _BY_OP.values()]
    explanation = f"{caption}. Only this op varies in the bank; teacher. Shuffled: another view's action."
    return ResultTable("Mean reciprocal rank of single ops ± standard error", ["op", *columns], rows, explanation)


_BY_OP = {"mrr": "", "shuffled_actions": "shuffled, "}
"""Parts of a result that the table of single ops has, with the beginnings of their columns."""


WAYS = [(distance, encoder) for distance in DISTANCES for encoder in ENCODERS]
"""Variants of MRR: (distance, encoder)."""


def way_name(distance: str, encoder: str) -> str:
    return f"{distance.replace('_', ' ')}, {encoder}"

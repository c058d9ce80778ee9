"""Composition of actions: two predictions in a row against one, an action and its inverse, an action in steps.

x is a clean image, y and z are jittered views of it, which exist as images, so that their target features are known.
The actions a: x → y, b: y → z and ab: x → z follow from the views' parameters, and a⁻¹ is the action y → x. The second
pass begins with the first prediction, as reentry.py describes.

- Composition: the features after a, then b, should be those of z. Its rank among a bank of views is asked.
- Undoing: the features after a, then a⁻¹, should be those of x. Its rank among the bank and x itself is asked.
- Chain: the line from x to z in the space of parameters is divided into k equal steps, and each is one pass.

A world model that composes gives with two passes what it gives with one. Rows of each table besides: target features of
y re-entered instead of a prediction, which shows the loss by re-entry; the encoder's features of y, which show what the
second action can reach; controls with the action of another pair of views, the first action alone and the null action.

Distances are relative: mean distance of the predictions of an image to their goals over the mean distance of what is
known without a prediction (target features of x; in undoing those of y). 1 is as far as doing nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from rich.progress import track
from torch import Tensor

from dali_pipelines.augmentations import IDENTITY
from dali_pipelines.replay import sample_photometric
from iwm.actions import action_between
from iwm.evaluation.action_settings import CompositionSettings
from iwm.evaluation.bank import (
    UNCONDITIONED_NOTE,
    Bank,
    chance_mrr,
    check_changes,
    check_queries,
    derangement,
    distances_to,
    embed_bank,
    rank_of_target,
)
from iwm.evaluation.common import EvalContext, mean_and_stderr
from iwm.evaluation.reentry import predict_in_a_row, predict_in_parts, reenter
from iwm.evaluation.result_table import ResultTable, format_mean_stderr
from iwm.evaluation.settings import DISTANCES, bank_augmentation

COMPOSITION = {
    "two_passes": "two passes: a, then b",
    "one_pass": "one pass: ab",
    "reentered_view": "target features of y re-entered, then b",
    "encoded_view": "encoder's features of y, then b",
    "other_action": "control: a, then another pair's b",
    "first_pass": "a alone",
    "null": "null action",
    "source": "target features of x",
}
"""Rows of composition by their key in the result."""

UNDOING = {
    "two_passes": "two passes: a, then a⁻¹",
    "null": "one null pass",
    "two_null": "two null passes",
    "reentered_view": "target features of y re-entered, then a⁻¹",
    "encoded_view": "encoder's features of y, then a⁻¹",
    "other_action": "control: a, then another pair's a⁻¹",
    "first_pass": "not undone: a alone",
}
"""Rows of undoing by their key in the result."""

MEASURES = {"mrr": "MRR", "relative_distance": "distance"}
"""Column titles of the scores, by their key in the result."""

ImageScores = dict[str, dict[str, Tensor]]
"""Scores [measure, distance] of one image by part (composition, undoing, chain) and row."""


@torch.no_grad()
def score_image(
    context: EvalContext, image: UInt8[Tensor, "h w 3"], settings: CompositionSettings, generator: torch.Generator
) -> ImageScores:
    """Return the scores of all rows, means over the image's pairs of views y and z."""
    model, size, q, device = context.model, settings.bank.num_views, settings.num_queries, image.device
    jitter, spec = bank_augmentation(context.config.views, settings.bank.scenario), model.action_spec
    batch_size = settings.bank.batch_size
    views, y_params = (sample_photometric(jitter, count, generator).to(device) for count in (size, q))
    other, clean = derangement(q, generator).to(device), torch.tensor([IDENTITY], device=device)
    bank = embed_bank(model, image, torch.cat([clean, views, y_params]), batch_size)
    x_params, z_params = clean.expand(q, -1), views[:q]
    a, b = action_between(x_params, y_params, spec), action_between(y_params, z_params, spec)
    ab, inverse = action_between(x_params, z_params, spec), action_between(y_params, x_params, spec)
    null = action_between(clean, clean, spec)

    x = model.encode(image[None], settings.encoder)
    y = torch.cat([model.encode(part, settings.encoder) for part in bank.views[1 + size :].split(batch_size)])
    once = predict_in_parts(model, x.expand(2 * q + 1, -1, -1), torch.cat([a, ab, null]), batch_size)
    after_a, after_ab, after_null = once.split([q, q, 1])
    again, of_y = reenter(model, after_a, x), reenter(model, bank.targets[1 + size :], x)
    second = {
        "composition": {
            "two_passes": (again, b),
            "reentered_view": (of_y, b),
            "encoded_view": (y, b),
            "other_action": (again, b[other]),
        },
        "undoing": {
            "two_passes": (again, inverse),
            "two_null": (reenter(model, after_null, x), null),
            "reentered_view": (of_y, inverse),
            "encoded_view": (y, inverse),
            "other_action": (again, inverse[other]),
        },
    }
    twice = {
        part: {row: predict_in_parts(model, *pair, batch_size).expand(q, -1, -1) for row, pair in pairs.items()}
        for part, pairs in second.items()
    }
    alone = {"first_pass": after_a, "null": after_null.expand(q, -1, -1)}
    one_pass = {"one_pass": after_ab, "source": bank.targets[:1].expand(q, -1, -1)}
    chain = {"1": after_ab}
    for k in range(2, settings.passes + 1):
        line = [torch.lerp(x_params, z_params, step / k) for step in range(k + 1)]
        steps = torch.stack([action_between(*ends, spec) for ends in pairwise(line)])
        chain[str(k)] = predict_in_a_row(model, x.expand(q, -1, -1), steps, batch_size)
    return {
        "composition": reached_views(bank, size, twice["composition"] | alone | one_pass),
        "undoing": reached_source(bank, size, twice["undoing"] | alone),
        "chain": reached_views(bank, size, chain),
    }


def reached_views(bank: Bank, size: int, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Score predictions [q, n, d] by row, whose goals are the first q views. The bank holds x, `size` views, and y.

    The start is x.
    """
    distances = _distances(bank, predictions)[..., 1 : size + 1]
    ranks = rank_of_target(distances, bank.norms[:, 1 : size + 1])
    goals = distances.diagonal(dim1=-2, dim2=-1)
    start = distances_to(bank, bank.targets[:1])[:, 0, 1 : 1 + goals.shape[-1]]
    return _scores(predictions, ranks, goals, start)


def reached_source(bank: Bank, size: int, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Score predictions [q, n, d] by row, whose goal is x. The bank holds x, `size` views, and y, which is not ranked.

    The start of each pair is its y.
    """
    distances = _distances(bank, predictions)[..., : size + 1]
    # A row for each prediction, because rank_of_target takes entry 0 as the true one of a single row.
    ranks = rank_of_target(distances.flatten(1, 2)[:, :, None], bank.norms[:, : size + 1])[..., 0]
    start = distances_to(bank, bank.targets[:1])[:, 0, size + 1 :]
    return _scores(predictions, ranks.unflatten(1, distances.shape[1:3]), distances[..., 0], start)


def _distances(bank: Bank, predictions: Mapping[str, Tensor]) -> Float[Tensor, "distance row q k"]:
    """Return the distances of all rows' predictions to the bank."""
    together = distances_to(bank, torch.cat(list(predictions.values())))
    return together.unflatten(1, (len(predictions), -1))


def _scores(
    names: Iterable[str],
    ranks: Float[Tensor, "distance row q"],
    goals: Float[Tensor, "distance row q"],
    start: Float[Tensor, "distance q"],
) -> dict[str, Tensor]:
    """Return MRR and relative distance [measure, distance] by row.

    goals: distances of the predictions to their goals. start: distances of the starts to the goals.
    """
    relative = goals.mean(-1) / start.mean(-1, keepdim=True)
    scores = torch.stack([(1 / ranks).double().mean(-1), relative]).cpu()
    return dict(zip(names, scores.unbind(2), strict=True))


def evaluate(context: EvalContext, settings: CompositionSettings, output: Path) -> dict[str, Any]:
    """Score all rows. Raises ConfigError for invalid settings and fewer than two images."""
    check_queries(settings.num_queries, settings.bank)
    check_changes(bank_augmentation(context.config.views, settings.bank.scenario))
    images, _ = context.first_images(settings.bank.num_images, at_least=2)
    generator = torch.Generator().manual_seed(settings.seed)
    scores = [score_image(context, image, settings, generator) for image in track(images, "images", transient=True)]
    return {
        "chance": chance_mrr(settings.bank.num_views),
        "chance_source": chance_mrr(settings.bank.num_views + 1),
        "images": len(images),
        "bank": settings.bank.num_views,
        "queries": settings.num_queries,
        "context": settings.encoder,
        "conditioning": context.config.action.conditioning,
        "trained": context.config.views.source.jitter_probability > 0,
        **{part: _means([image_scores[part] for image_scores in scores]) for part in scores[0]},
    }


def _means(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return mean and standard error over images under `[row][measure][distance]`."""
    return {
        row: {
            measure: {
                distance: mean_and_stderr(torch.stack([scores[row][i, j] for scores in images]))
                for j, distance in enumerate(DISTANCES)
            }
            for i, measure in enumerate(MEASURES)
        }
        for row in images[0]
    }


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return composition, undoing and the chain, one column per measure and distance."""
    scores = [f"{title}, {distance.replace('_', ' ')}" for title in MEASURES.values() for distance in DISTANCES]
    composition = f"{_origin(result)} MRR of z: chance {result['chance']:.4f}. {_DISTANCE.format(goal='z', start='x')}"
    if not result["trained"]:
        composition += " The run's sources were never jittered, so actions from y are untrained."
    if result["conditioning"] == "none":
        composition += f" {UNCONDITIONED_NOTE}"
    undoing = (
        f"MRR of x among it and the bank: chance {result['chance_source']:.4f}. {_DISTANCE.format(goal='x', start='y')}"
    )
    chain = "Each pass is an equal share of the change of parameters from x to z."
    steps = {k: f"{k} pass{'es' if k != '1' else ''}" for k in result["chain"]}
    return [
        ResultTable(title, [head, *scores], [[name, *_cells(result[part][row])] for row, name in rows.items()], caption)
        for title, head, part, rows, caption in (
            ("Composition: x to z over y", "prediction", "composition", COMPOSITION, composition),
            ("Undoing: x to y and back", "prediction", "undoing", UNDOING, undoing),
            ("Chain: x to z in equal steps", "steps", "chain", steps, chain),
        )
    ]


_DISTANCE = "Distance: to {goal}, over that of the target features of {start} (1: as far as doing nothing)."


def _origin(result: Mapping[str, Any]) -> str:
    return (
        f"{result['images']} images, bank of {result['bank']} views, {result['queries']} pairs of views y, z each; "
        f"{result['context']}. a: from x to y, b: from y to z, ab: from x to z."
    )


def _cells(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [format_mean_stderr(scores[measure][distance]) for measure in MEASURES for distance in DISTANCES]

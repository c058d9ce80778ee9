"""MRR from corrupted sources (paper, section 4.3): the predictor undoes a corruption.

Corruptions are grayscale, blur, solarize, each jitter parameter in both directions, and combinations of them. The bank
holds jittered views of the clean image, as in MRR. Scores of each corruption:

- `with_action`: MRR with the action from the corrupted source to each view;
- `without_action`: MRR with the action from the clean image to each view, which does not describe the corruption;
- `shuffled`: MRR with another view's action;
- `restored`: reciprocal rank of the clean image among it and the bank, with the action that only undoes the corruption.

MRR from the clean source is the upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from rich.progress import track
from torch import Tensor

from dali_pipelines.augmentations import IDENTITY, JITTER_OPS, OP_BY_NAME, OPS, Op, PhotometricConfig
from dali_pipelines.replay import apply_photometric, sample_photometric
from dali_pipelines.views import Views
from iwm.actions import action_between
from iwm.config import ConfigError
from iwm.evaluation.bank import (
    MIN_FACTOR,
    UNCONDITIONED_NOTE,
    actions_from,
    chance_mrr,
    check_queries,
    derangement,
    embed_bank,
    predicted_distances,
    rank_of_target,
)
from iwm.evaluation.common import EvalContext, mean_and_stderr
from iwm.evaluation.figures import FigureTile, TileBlock, TileColumn, TileFigure, TileGroup, write_figures
from iwm.evaluation.result_table import ResultTable, format_mean_stderr
from iwm.evaluation.settings import (
    DISTANCES,
    CorruptionSettings,
    bank_augmentation,
)

SCORE_NAMES = ("with_action", "without_action", "shuffled", "restored")
SCORE_TITLES = ("with action", "without action", "shuffled actions", "restored")
"""Column titles of the scores."""


@dataclass(frozen=True)
class Corruption:
    """Corruption of the source."""

    op: str
    strength: str
    """Strength as text: '×0.60', 'σ 2.0 px', 'on'."""
    params: tuple[float, ...]
    """Augmentation parameters, in the order of PHOTOMETRIC_FIELDS."""
    jitter_sampled: bool
    """True where the jitter is sampled per image from the bank's range and replaces that of `params`."""
    trained: bool
    """True where the run's sources had this corruption in training."""


def make_corruptions(views: Views, settings: CorruptionSettings) -> list[Corruption]:
    """Return all corruptions, by op and rising strength. Jitter parameters that the bank never changes are omitted."""
    jitter, source = bank_augmentation(views, settings.bank.scenario), views.source
    levels = {op: op.levels for op in views.destructive_ops} | {OP_BY_NAME["blur"]: settings.blur_sigmas}
    corruptions = []
    for op, values in levels.items():
        for value in values:
            trained = source.probability(op) > 0
            corruptions.append(Corruption(op.name, op.in_words(value), _params({op: value}), False, trained))
    for op in JITTER_OPS:
        trained = source.jitter_probability > 0 and getattr(source, op.name) > 0
        for value in _values(jitter, op, settings.strengths):
            corruptions.append(Corruption(op.name, op.in_words(value), _params({op: value}), False, trained))
    everything = {op: sorted(values)[len(values) // 2] for op, values in levels.items()}
    corruptions.append(Corruption("all jitter", "drawn", _params({}), True, source.jitter_probability > 0))
    corruptions.append(
        Corruption("everything", "drawn", _params(everything), True, all(item.trained for item in corruptions))
    )
    return corruptions


def _values(jitter: PhotometricConfig, op: Op, shares: Sequence[float]) -> list[float]:
    nothing = op.identity
    ends = jitter.value_range(op)
    values = sorted({nothing + share * (end - nothing) for end in ends for share in shares} - {nothing})
    return [max(value, MIN_FACTOR) if op.is_factor else value for value in values]


def _params(values: dict[Op, float]) -> tuple[float, ...]:
    return tuple(values.get(op, op.identity) for op in OPS)


@dataclass(frozen=True)
class CorruptionScores:
    """Scores of one image by source: the clean one first, then the corruptions."""

    scores: Float[Tensor, "score s"]
    """Mean reciprocal ranks; axis 0 follows SCORE_NAMES."""
    sources: UInt8[Tensor, "s h w 3"]
    restored: UInt8[Tensor, "s h w 3"]
    """View nearest to the prediction with the action that only undoes the corruption."""
    hit: Bool[Tensor, " s"]
    """True where that view is the clean image."""


@torch.no_grad()
def score_corruptions(
    context: EvalContext,
    image: UInt8[Tensor, "h w 3"],
    corruptions: Sequence[Corruption],
    settings: CorruptionSettings,
    generator: torch.Generator,
) -> CorruptionScores:
    """Corrupt an image in every way and rank the views of its bank from each. The bank is embedded once."""
    model, size, q, device = context.model, settings.bank.num_views, settings.num_queries, image.device
    spec, colour = model.action_spec, model.config.views.jitter_impl
    jitter = bank_augmentation(context.config.views, settings.bank.scenario)
    views = sample_photometric(jitter, size, generator)
    applied = torch.tensor([IDENTITY, *(item.params for item in corruptions)])
    sampled = sample_photometric(jitter, 1, generator)[0, : len(JITTER_OPS)]
    applied[[False, *(item.jitter_sampled for item in corruptions)], : len(JITTER_OPS)] = sampled
    other = derangement(q, generator).to(device)
    views, applied, clean = views.to(device), applied.to(device), torch.tensor([IDENTITY], device=device)

    bank = embed_bank(model, image, torch.cat([views, clean]), settings.bank.batch_size)
    sources = apply_photometric(image.expand(len(applied), -1, -1, -1), applied, colour)
    with_action = torch.stack([actions_from(views[:q], spec, source) for source in applied])
    without_action = actions_from(views[:q], spec).expand_as(with_action)
    only_undo = action_between(applied, clean.expand_as(applied), spec)[:, None]
    distances = predicted_distances(
        model,
        bank,
        sources,
        torch.cat([with_action, without_action, only_undo], dim=1),
        distances=(settings.distance,),
        encoders=(settings.encoder,),
        batch_size=settings.bank.batch_size,
    )[0]
    norms = bank.norms[[DISTANCES.index(settings.distance)]]
    among = distances[..., :size]
    ranks = [rank_of_target(part, norms[:, :size])[0] for part in (among[..., :q, :], among[..., q : 2 * q, :])]
    ranks.append(rank_of_target(among[..., other, :], norms[:, :size])[0])
    # The clean image is the last entry; flip, because rank_of_target takes entry 0 as the true one of a single row.
    ranks.append(rank_of_target(distances[..., -1:, :].flip(-1), norms.flip(-1))[0])
    scores = torch.stack([(1 / rank).double().mean(-1) for rank in ranks])
    nearest = distances[0, :, -1].argmin(-1)
    return CorruptionScores(scores.cpu(), sources.cpu(), bank.views[nearest].cpu(), (nearest == size).cpu())


def evaluate(context: EvalContext, settings: CorruptionSettings, output: Path) -> dict[str, Any]:
    """Score all corruptions; the figure shows some images, each corruption at its greatest strength.

    Raises ConfigError for invalid settings and fewer than two images.
    """
    _check(settings)
    corruptions = make_corruptions(context.config.views, settings)
    images, keys = context.first_images(settings.bank.num_images, at_least=2)
    generator = torch.Generator().manual_seed(settings.seed)
    shown = torch.randperm(len(images), generator=generator)[: settings.num_shown].tolist()
    scores, drawn = [], {}
    for i in track(range(len(images)), "corruptions", transient=True):
        image_scores = score_corruptions(context, images[i], corruptions, settings, generator)
        scores.append(image_scores.scores)
        if i in shown:
            drawn[i] = image_scores
    by_source = torch.stack(scores, dim=-1)
    figures = [figure({keys[i]: drawn[i] for i in shown}, corruptions, settings.bank.num_views)] if shown else []
    return {
        "chance": chance_mrr(settings.bank.num_views),
        "images": len(images),
        "bank": settings.bank.num_views,
        "queries": settings.num_queries,
        "distance": settings.distance,
        "context": settings.encoder,
        "conditioning": context.config.action.conditioning,
        "clean": _scores(by_source[:, :1]),
        "ops": _by_op(corruptions, by_source[:, 1:]),
        "photographs": [keys[i] for i in shown],
        **write_figures(figures, output),
    }


def _check(settings: CorruptionSettings) -> None:
    check_queries(settings.num_queries, settings.bank)
    if not settings.blur_sigmas:
        raise ConfigError("--blur-sigmas: name at least one sigma")


def _by_op(corruptions: Sequence[Corruption], scores: Float[Tensor, "score c images"]) -> list[dict[str, Any]]:
    """Return the scores of each op over its strengths, and of each strength."""
    ops = []
    for op, group in groupby(range(len(corruptions)), key=lambda c: corruptions[c].op):
        columns = list(group)
        strengths = [{"strength": corruptions[c].strength, **_scores(scores[:, [c]])} for c in columns]
        trained = corruptions[columns[0]].trained
        ops.append({"op": op, "trained": trained, **_scores(scores[:, columns]), "strengths": strengths})
    return ops


def _scores(scores: Float[Tensor, "score c images"]) -> dict[str, dict[str, float]]:
    """Return the mean over corruptions and images, and its standard error over images."""
    return {name: mean_and_stderr(per_image) for name, per_image in zip(SCORE_NAMES, scores.mean(1), strict=True)}


def figure(shown: Mapping[str, CorruptionScores], corruptions: Sequence[Corruption], bank: int) -> TileFigure:
    """Return the figure of images by their keys: a block for each op at its greatest strength, a column per image."""
    last = {item.op: c for c, item in enumerate(corruptions, start=1)}
    blocks = []
    for op, c in last.items():
        name = _named(op, corruptions[c - 1].strength)
        columns = [_column(key, name, scores, c) for key, scores in shown.items()]
        blocks.append(TileBlock(name, columns, rows=("source", "nearest", "clean")))
    caption = (
        "Each corruption at its greatest strength: the source; the view nearest to the prediction that only undoes it, "
        f"among {bank} jittered views and the clean image; the clean image. Photographs: {', '.join(shown)}."
    )
    mark = "the nearest view is the clean image"
    return TileFigure("Undone corruptions", caption, [TileGroup("", blocks)], mark=mark)


def _column(key: str, name: str, scores: CorruptionScores, c: int) -> TileColumn:
    words, hit = f"photograph {key}, {name}", bool(scores.hit[c])
    found = "which is the clean image" if hit else "not the clean image"
    return TileColumn(
        "",
        (
            FigureTile(scores.sources[c], f"{words}: source"),
            FigureTile(scores.restored[c], f"{words}: view nearest to the prediction, {found}", marked=hit),
            FigureTile(scores.sources[0], f"{words}: clean image"),
        ),
    )


def _named(op: str, strength: str) -> str:
    return op if strength in ("on", "drawn") else f"{op} {strength}"


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the scores of each op and, for ops with several strengths, of each strength."""
    caption = (
        f"{result['images']} images, bank of {result['bank']} views, {result['queries']} of them queried; "
        f"{result['distance'].replace('_', ' ')}, {result['context']}; chance {result['chance']:.4f}. "
        "Without action: the action does not describe the corruption."
    )
    if result["conditioning"] == "none":
        caption += f" {UNCONDITIONED_NOTE}"
    columns = ["source", *SCORE_TITLES]
    ops, strengths = [["clean (upper bound)", *_cells(result["clean"])]], []
    for op in result["ops"]:
        several = len(op["strengths"]) > 1
        name = op["op"] if several else _named(op["op"], op["strengths"][0]["strength"])
        ops.append([name if op["trained"] else f"{name} (untrained)", *_cells(op)])
        strengths += [[_named(op["op"], level["strength"]), *_cells(level)] for level in op["strengths"] if several]
    by_op = ResultTable("MRR from a corrupted source ± standard error", columns, ops, caption)
    return [by_op, ResultTable("By strength", columns, strengths)] if strengths else [by_op]


def _cells(scores: Mapping[str, Any]) -> list[str]:
    return [format_mean_stderr(scores[name]) for name in SCORE_NAMES]

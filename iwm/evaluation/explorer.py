"""Precomputed predictions for a grid of actions, for the explorer on report.html.

The grid holds all combinations of a few values of brightness, contrast, saturation and hue. Each combination is a view
of an image, and the views are both the bank and the targets of the actions. The source is the clean image, or
the image after grayscale, blur or solarize, which the action then also undoes. Distances are those of MRR: features
averaged over tokens, source through the target encoder.

Files next to explorer.json:

- explorer.npz with `points`, int16 [image, 1 + source, view, component]: features of the views, then predictions from
  each source, compressed (compression.py) in units of the image's `scale`; and `norms`, float32 [image, view]: norms of
  the views' features, the scale of the tie tolerance;
- explorer-I.webp for each image: all views, then the sources, in rows of `columns`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from rich.progress import track
from torch import Tensor

from dali_pipelines.augmentations import COLUMNS, IDENTITY, JITTER_OPS, OP_BY_NAME, PhotometricConfig
from dali_pipelines.replay import apply_photometric
from dali_pipelines.views import Views
from iwm.actions import ActionSpec, action_between, describe_action
from iwm.config import ConfigError
from iwm.evaluation.bank import MIN_FACTOR, actions_from, chance_mrr
from iwm.evaluation.common import EvalContext
from iwm.evaluation.compression import BankFeatures, compress, fit_pca_basis, rank_agreement
from iwm.evaluation.result_table import ResultTable
from iwm.evaluation.settings import MAX_VALUES, ExplorerSettings, bank_augmentation
from iwm.models.world_model import WorldModel
from iwm.training.checkpoint import CheckpointError
from shards.atomic import write_atomically

SIDE = 64
"""Largest side of a view in the sprite sheet (pixels)."""
QUALITY = 85
"""Quality of the WebP files (0 to 100)."""


@dataclass(frozen=True)
class ActionGrid:
    """Grid of all combinations of a few values of each jitter component."""

    axes: dict[str, list[float]]
    """Values by name of jitter op: the paper's, where one that is never changed has one value, and others that are
    changed. The last varies fastest."""
    params: Float[Tensor, "k p"]


@dataclass(frozen=True)
class ViewPredictions:
    """Views, sources and pooled features of one image."""

    views: UInt8[Tensor, "k h w 3"]
    sources: UInt8[Tensor, "s h w 3"]
    features: BankFeatures
    """Features of the views and, from each source, predictions with the action to each view."""


def action_grid(jitter: PhotometricConfig, values: int) -> ActionGrid:
    """Return all combinations of `values` evenly spaced values of each component over the ranges of `jitter`."""
    axes = {}
    for op in JITTER_OPS:
        low, high = jitter.value_range(op)
        low = max(low, MIN_FACTOR) if op.is_factor else low
        if high > low:
            axes[op.name] = torch.linspace(low, high, values).tolist()
        elif op.in_paper:
            axes[op.name] = [op.identity]
    combinations = torch.cartesian_prod(*(torch.tensor(axis) for axis in axes.values()))
    params = torch.tensor(IDENTITY).repeat(len(combinations), 1)
    params[:, [COLUMNS[name] for name in axes]] = combinations
    return ActionGrid(axes, params)


def fitting_values(jitter: PhotometricConfig, values: int) -> int:
    """Return `values`, or the most below it, at least 2, with which the grid over `jitter` is not too large.

    The limit is a grid of MAX_VALUES values of the paper's four components.
    """
    varied = sum(low < high for low, high in map(jitter.value_range, JITTER_OPS))
    while values > 2 and values**varied > MAX_VALUES**4:
        values -= 1
    return values


def source_params(views: Views, blur_sigma: float) -> dict[str, tuple[float, ...]]:
    """Return the parameters (PHOTOMETRIC_FIELDS) of the sources by name, the clean one first."""
    middle = {op: op.levels[len(op.levels) // 2] for op in views.destructive_ops} | {OP_BY_NAME["blur"]: blur_sigma}
    states = {"clean": IDENTITY}
    for op, value in middle.items():
        at = COLUMNS[op.name]
        states[op.name] = (*IDENTITY[:at], value, *IDENTITY[at + 1 :])
    return states


@torch.no_grad()
def predict_views(
    model: WorldModel,
    image: UInt8[Tensor, "h w 3"],
    views: Float[Tensor, "k p"],
    states: Float[Tensor, "s p"],
    batch_size: int,
) -> ViewPredictions:
    """Make the views and sources of an image, embed the views, and predict each view from each source."""
    colour = model.config.views.jitter_impl
    view_images = torch.cat(
        [apply_photometric(image.expand(len(p), -1, -1, -1), p, colour) for p in views.split(batch_size)]
    )
    source_images = apply_photometric(image.expand(len(states), -1, -1, -1), states, colour)
    bank = torch.cat([model.target_features(part).float().mean(1) for part in view_images.split(batch_size)])
    predictions = []
    for context, state in zip(model.encode(source_images, "teacher"), states, strict=True):
        actions = actions_from(views, model.action_spec, state)
        parts = (model.predict(context.expand(len(a), -1, -1), a).float().mean(1) for a in actions.split(batch_size))
        predictions.append(torch.cat(list(parts)))
    return ViewPredictions(view_images, source_images, BankFeatures(bank, torch.stack(predictions)))


def axis_labels(views: ActionGrid, spec: ActionSpec) -> dict[str, list[str]]:
    """Return the description of each single value, '' for no change. Joined by commas they describe the action."""
    words = {}
    for name, values in views.axes.items():
        target = torch.tensor(IDENTITY).repeat(len(values), 1)
        target[:, COLUMNS[name]] = torch.tensor(values)
        words[name] = _label(torch.tensor(IDENTITY).expand_as(target), target, spec)
    return words


def _label(source: Float[Tensor, "k p"], target: Float[Tensor, "k p"], spec: ActionSpec) -> list[str]:
    descriptions = (describe_action(action, spec) for action in action_between(source, target, spec))
    return ["" if words == "nothing" else words for words in descriptions]


def sprite_sheet(answers: ViewPredictions, columns: int) -> Image.Image:
    """Draw all views, then the sources, in rows of `columns`."""
    pictures = torch.cat([answers.views, answers.sources]).float().permute(0, 3, 1, 2)
    side = min(pictures.shape[-1], SIDE)
    if side < pictures.shape[-1]:
        pictures = torch.nn.functional.interpolate(pictures, size=side, mode="bilinear", antialias=True)
    rows = math.ceil(len(pictures) / columns)
    cells = pictures.new_zeros(rows * columns, 3, side, side)
    cells[: len(pictures)] = pictures
    whole = cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    return Image.fromarray(whole.round().clamp(0, 255).byte().cpu().numpy())


def evaluate(context: EvalContext, settings: ExplorerSettings, output: Path) -> dict[str, Any]:
    """Write points and sprite sheets next to `output`; return the data of the page and the agreement of ranks.

    Raises ConfigError where the grid has a single view, CheckpointError where features are not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    images, keys = context.random_images(settings.num_images, generator)
    jitter = bank_augmentation(context.config.views, settings.scenario, "--scenario")
    values = fitting_values(jitter, settings.num_values)
    if values < settings.num_values:
        context.notes.append(f"{values} values of each component: {settings.num_values} would give too many views")
    views = action_grid(jitter, values)
    if len(views.params) == 1:
        raise ConfigError("the run's jitter changes nothing; use --scenario default")
    states = source_params(context.config.views, settings.blur_sigma)
    columns = math.ceil(math.sqrt(len(views.params) + len(states)))
    params, from_params = views.params.to(context.device), torch.tensor(list(states.values()), device=context.device)

    features, pictures = [], []
    for old in output.parent.glob(f"{output.stem}-*.webp"):
        old.unlink()
    for i, image in enumerate(track(images, "images", transient=True)):
        answers = predict_views(context.model, image, params, from_params, settings.batch_size)
        if not (answers.features.bank.isfinite().all() and answers.features.predictions.isfinite().all()):
            raise CheckpointError(
                f"{context.checkpoint}: the model's features are not finite; evaluate an earlier checkpoint"
            )
        features.append(answers.features)
        pictures.append(f"{output.stem}-{i}.webp")
        picture = BytesIO()
        sprite_sheet(answers, columns).save(picture, "webp", quality=QUALITY)
        write_atomically(output.with_name(pictures[-1]), picture.getvalue())
    bases = [fit_pca_basis(item, settings.explained_variance) for item in features]
    components = max(basis.num_components for basis in bases)
    stored = [compress(item, basis.components[:, :components]) for item, basis in zip(features, bases, strict=True)]
    points, arrays = output.with_suffix(".npz"), BytesIO()
    np.savez(
        arrays,
        points=torch.stack([item.points for item in stored]).cpu().numpy(),
        norms=torch.stack([item.norms for item in stored]).cpu().numpy(),
    )
    write_atomically(points, arrays.getvalue())
    agreement = rank_agreement(features, stored)
    spec = context.model.action_spec
    undo_labels = _label(from_params.cpu(), torch.tensor(IDENTITY).expand_as(from_params), spec)
    return {
        "bank": len(views.params),
        "chance": chance_mrr(len(views.params)),
        "conditioning": context.config.action.conditioning,
        "points": points.name,
        "components": components,
        "columns": columns,
        "side": min(context.config.views.size, SIDE),
        "axes": views.axes,
        "words": axis_labels(views, spec),
        "sources": [
            {"name": name, "words": words, "mrr": exact, "mrr_stored": compressed}
            for name, words, exact, compressed in zip(
                states, undo_labels, agreement.mrr, agreement.mrr_compressed, strict=True
            )
        ],
        "same_rank": agreement.same_rank,
        "largest_difference": agreement.largest_difference,
        "photographs": [
            {"key": key, "picture": picture, "scale": item.scale}
            for key, picture, item in zip(keys, pictures, stored, strict=True)
        ],
    }


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return MRR from each source, from exact and stored features."""
    rows = [
        [source["name"], source["words"], f"{source['mrr']:.3f}", f"{source['mrr_stored']:.3f}"]
        for source in result["sources"]
    ]
    title = f"Explorer data: {len(result['photographs'])} images, {result['bank']} views each"
    caption = (
        f"{result['components']} PCA components, {result['same_rank']:.1%} of ranks unchanged; "
        f"chance {result['chance']:.4f}."
    )
    return [
        ResultTable(title, ["source", "undone by the action", "MRR, pooled", "MRR, stored features"], rows, caption)
    ]

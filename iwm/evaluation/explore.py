"""What the explorer on report.html needs: the predictor's answers to a lattice of actions, to be looked up in no time.

Of each of a few held-out photographs the lattice holds every combination of a few values of brightness, contrast,
saturation and hue: a jittered view each, which is at once the bank and the list of actions. The source is the
photograph itself or what grayscale, blur or solarize leave of it, which the action then undoes. Distances are MRR's:
features averaged over tokens, the source through the target encoder.

Beside explore.json lies explore.npz, with
- `points` int16 [image, 1 + source, view, component]: features of the views, then predictions from each source, turned
  and rounded (compact.py) in units of the image's `scale`;
- `norms` float32 [image, view]: norms of the views' features, which ties are judged by;

and for each image explore-I.webp: pictures of all views, then of the sources, in rows of `columns`.
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
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dali_pipelines.augmentation import IDENTITY, JITTER_FIELDS, PHOTOMETRIC_FIELDS, Photometric
from dali_pipelines.replay import photometric
from iwm.actions import ActionSpec, action_between, describe
from iwm.config import ConfigError
from iwm.evaluation.bank import actions_to
from iwm.evaluation.compact import Features, agreement, compact, directions
from iwm.evaluation.mrr import LEAST_FACTOR, bank_jitter, chance
from iwm.evaluation.settings import Settings as Common
from iwm.evaluation.subject import Subject
from iwm.models.world_model import WorldModel
from iwm.training.checkpoint import CheckpointError
from shards.atomic import write_atomically

SIDE = 64
"""Largest side of a picture in pixels."""
QUALITY = 85
"""Of the WebP pictures."""
MOST_VALUES = 7
"""Of a component: ranking all of 7⁴ actions took a browser 1.1 s, which each new photograph waits for (5⁴: 0.06 s)."""


@dataclass(frozen=True)
class Settings(Common):
    """For the page's explorer: all actions of a lattice on a few photographs. Writes pictures beside the JSON."""

    images: int = 6
    """Held-out photographs, chosen at random by the seed."""
    values: int = 5
    """Values of each jitter component over its range, 2 to 7: the views are all their combinations, values⁴."""
    scenario: str | None = None
    """Row of table S2 whose target jitter the lattice spans. Default: the run's own, or that of `default`."""
    blur_sigma: float = 1.0
    """Of the blurred source, in pixels of the view."""
    kept: float = 0.9995
    """Share of the squared distances, 0 to 1, that the stored components hold."""
    chunk: int = 256
    """Views embedded and predicted at once; lower it when the device runs out of memory."""


@dataclass(frozen=True)
class Lattice:
    """All combinations of a few values of each component of the jitter."""

    axes: dict[str, list[float]]
    """Values by the names of JITTER_FIELDS; a component that is never changed has one. The last varies fastest."""
    params: Float[Tensor, "k 7"]


@dataclass(frozen=True)
class Answers:
    """One photograph's pictures and pooled features."""

    views: UInt8[Tensor, "k h w 3"]
    sources: UInt8[Tensor, "s h w 3"]
    features: Features
    """The views' and, from each source, the predictions with the action to each view."""


def lattice(jitter: Photometric, values: int) -> Lattice:
    """All combinations of `values` evenly spaced values of each component over the ranges of `jitter`."""
    axes = {}
    for name, unchanged in zip(JITTER_FIELDS, IDENTITY, strict=False):
        low, high = jitter.jitter_range(name)
        low = low if name == "hue" else max(low, LEAST_FACTOR)
        axes[name] = torch.linspace(low, high, values).tolist() if high > low else [unchanged]
    jittered = torch.cartesian_prod(*(torch.tensor(axis) for axis in axes.values()))
    rest = torch.tensor(IDENTITY[len(JITTER_FIELDS) :]).expand(len(jittered), -1)
    return Lattice(axes, torch.cat([jittered, rest], dim=1))


def sources(blur_sigma: float) -> dict[str, tuple[float, ...]]:
    """Params (PHOTOMETRIC_FIELDS) of the states that the source may be in, by name; the clean one first."""
    states = {"clean": IDENTITY}
    for name, value in (("grayscale", 1.0), ("blur_sigma", blur_sigma), ("solarize", 1.0)):
        at = PHOTOMETRIC_FIELDS.index(name)
        states[name.removesuffix("_sigma")] = (*IDENTITY[:at], value, *IDENTITY[at + 1 :])
    return states


@torch.no_grad()
def answer(
    model: WorldModel,
    image: UInt8[Tensor, "h w 3"],
    views: Float[Tensor, "k 7"],
    states: Float[Tensor, "s 7"],
    chunk: int,
) -> Answers:
    """Make the views and the sources of a photograph, embed the views, and predict each of them from each source."""
    colour = model.config.views.colour
    copies = torch.cat([photometric(image.expand(len(p), -1, -1, -1), p, colour) for p in views.split(chunk)])
    pictures = photometric(image.expand(len(states), -1, -1, -1), states, colour)
    bank = torch.cat([model.targets(part).float().mean(1) for part in copies.split(chunk)])
    predictions = []
    for context, state in zip(model.encode(pictures, "teacher"), states, strict=True):
        actions = actions_to(views, model.action_spec, state)
        parts = (model.predict(context.expand(len(a), -1, -1), a).float().mean(1) for a in actions.split(chunk))
        predictions.append(torch.cat(list(parts)))
    return Answers(copies, pictures, Features(bank, torch.stack(predictions)))


def axis_words(views: Lattice, spec: ActionSpec) -> dict[str, list[str]]:
    """What an action says of each value alone, '' where it says nothing. Joined by commas they are the whole action."""
    words = {}
    for column, (name, values) in enumerate(views.axes.items()):
        target = torch.tensor(IDENTITY).repeat(len(values), 1)
        target[:, column] = torch.tensor(values)
        words[name] = _said(torch.tensor(IDENTITY).expand_as(target), target, spec)
    return words


def _said(source: Float[Tensor, "k 7"], target: Float[Tensor, "k 7"], spec: ActionSpec) -> list[str]:
    said = (describe(action, spec) for action in action_between(source, target, spec))
    return ["" if words == "nothing" else words for words in said]


def atlas(answers: Answers, columns: int) -> Image.Image:
    """The pictures of all views, then of the sources, in rows of `columns`."""
    pictures = torch.cat([answers.views, answers.sources]).float().permute(0, 3, 1, 2)
    side = min(pictures.shape[-1], SIDE)
    if side < pictures.shape[-1]:
        pictures = torch.nn.functional.interpolate(pictures, size=side, mode="bilinear", antialias=True)
    rows = math.ceil(len(pictures) / columns)
    cells = pictures.new_zeros(rows * columns, 3, side, side)
    cells[: len(pictures)] = pictures
    whole = cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    return Image.fromarray(whole.round().clamp(0, 255).byte().cpu().numpy())


def evaluate(subject: Subject, settings: Settings, output: Path) -> dict[str, Any]:
    """Write the points and the pictures beside `output`; returns what the page must know of them, and how far the
    points answer as the features do. Raises ConfigError for a lattice that cannot be."""
    _check(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    images, keys = subject.random_images(settings.images, generator, option="--images")
    views = lattice(bank_jitter(subject.config.views, settings.scenario), settings.values)
    if len(views.params) == 1:
        raise ConfigError("the run's jitter changes nothing: say --scenario default")
    states = sources(settings.blur_sigma)
    columns = math.ceil(math.sqrt(len(views.params) + len(states)))
    params, from_params = views.params.to(subject.device), torch.tensor(list(states.values()), device=subject.device)

    features, pictures = [], []
    for old in output.parent.glob(f"{output.stem}-*.webp"):
        old.unlink()
    for i, image in enumerate(track(images, "photographs", transient=True)):
        answers = answer(subject.model, image, params, from_params, settings.chunk)
        if not (answers.features.bank.isfinite().all() and answers.features.predictions.isfinite().all()):
            raise CheckpointError(
                f"{subject.checkpoint}: the model's features are not finite; evaluate an earlier checkpoint"
            )
        features.append(answers.features)
        pictures.append(f"{output.stem}-{i}.webp")
        picture = BytesIO()
        atlas(answers, columns).save(picture, "webp", quality=QUALITY)
        write_atomically(output.with_name(pictures[-1]), picture.getvalue())
    found = [directions(each, settings.kept) for each in features]
    components = max(each.enough for each in found)
    stored = [compact(each, turn.columns[:, :components]) for each, turn in zip(features, found, strict=True)]
    points, arrays = output.with_suffix(".npz"), BytesIO()
    np.savez(
        arrays,
        points=torch.stack([each.points for each in stored]).cpu().numpy(),
        norms=torch.stack([each.norms for each in stored]).cpu().numpy(),
    )
    write_atomically(points, arrays.getvalue())
    agreed = agreement(features, stored)
    spec = subject.model.action_spec
    undone = _said(from_params.cpu(), torch.tensor(IDENTITY).expand_as(from_params), spec)
    return {
        "bank": len(views.params),
        "chance": chance(len(views.params)),
        "conditioning": subject.config.action.conditioning,
        "points": points.name,
        "components": components,
        "columns": columns,
        "side": min(subject.config.views.size, SIDE),
        "axes": views.axes,
        "words": axis_words(views, spec),
        "sources": [
            {"name": name, "words": words, "mrr": exact, "mrr_stored": kept}
            for name, words, exact, kept in zip(states, undone, agreed.mrr, agreed.mrr_compact, strict=True)
        ],
        "same_rank": agreed.same_rank,
        "largest_difference": agreed.largest_difference,
        "photographs": [
            {"key": key, "picture": picture, "scale": each.scale}
            for key, picture, each in zip(keys, pictures, stored, strict=True)
        ],
    }


def _check(settings: Settings) -> None:
    for name, good, allowed in (
        ("images", settings.images >= 1, "at least 1"),
        ("values", 2 <= settings.values <= MOST_VALUES, f"2 to {MOST_VALUES}"),
        ("blur-sigma", settings.blur_sigma > 0, "above 0"),
        ("kept", 0 < settings.kept <= 1, "above 0, at most 1"),
        ("chunk", settings.chunk >= 1, "at least 1"),
    ):
        if not good:
            raise ConfigError(f"--{name} {getattr(settings, name.replace('-', '_'))}: must be {allowed}")


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    made = Table(
        title=f"For the page's explorer: {len(result['photographs'])} photographs, {result['bank']} views each",
        caption=f"{result['components']} components, {result['same_rank']:.1%} of ranks the same; "
        f"chance {result['chance']:.4f}",
        box=SIMPLE_HEAD,
    )
    for column in ("source", "action also says", "MRR, pooled", "as stored"):
        made.add_column(column, justify="right" if column in ("MRR, pooled", "as stored") else "left")
    for source in result["sources"]:
        made.add_row(source["name"], source["words"], f"{source['mrr']:.3f}", f"{source['mrr_stored']:.3f}")
    return made

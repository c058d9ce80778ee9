"""Marginalised representations (paper, appendix H, figure S4, table S6): invariance made by averaging predictions.

Of a clean image's features the predictor makes those of N randomly jittered versions; their mean is z_inv. No picture
is augmented and no encoder run for it. The actions are drawn from the bank's jitter, independently of the copies in
the bank and for every image anew; the first N of an image's draws serve every larger N too. Beside them stands `null`:
the single prediction with the action that changes nothing. Features are those of the target encoder, averaged over
tokens.

- Retrieval: the rank of the clean image among its jittered copies and itself, by distance to z_inv, and how strongly
  the nearest copies are jittered (marginalise.strengths). `copies` is what a perfect world model would score: the mean
  of the copies' own features.
- Linear accuracy: a linear classifier (logistic.py) trained on z_inv of training images and judged on that of held-out
  ones; `teacher` the same of the target encoder's features themselves.

Without conditioning all predictions of an image are one, and N changes nothing by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dali_pipelines.augmentation import IDENTITY, Photometric
from dali_pipelines.replay import draw_photometric
from iwm.config import ConfigError
from iwm.evaluation.bank import embed_bank
from iwm.evaluation.linear import LinearSettings, linear_accuracy
from iwm.evaluation.marginalise import Neighbours, marginalise, neighbours, strengths
from iwm.evaluation.mrr import BankSettings, bank_jitter, chance
from iwm.evaluation.over_images import over_images
from iwm.evaluation.paper import TABLE_S6
from iwm.evaluation.settings import Settings as Common
from iwm.evaluation.subject import Subject

NULL, COPIES, TEACHER = "null", "copies", "teacher"
"""What stands beside the numbers of predictions: see above."""

PICTURED, ACROSS = 3, 8
"""Images in the picture, and copies of each."""


@dataclass(frozen=True)
class Settings(Common):
    """Means of N predictions: what they retrieve and classify. Writes RUN/eval/marginal.png beside the JSON."""

    predictions: tuple[int, ...] = (1, 8, 16, 32, 128)
    """N: predictions that are averaged. Every image costs the largest."""
    bank: BankSettings = field(default_factory=lambda: BankSettings(images=24))
    nearest: int = 5
    """Nearest copies whose strength is averaged."""
    linear: bool = True
    """Whether to train and judge linear classifiers, which needs labels."""
    probe: LinearSettings = field(default_factory=LinearSettings)


@dataclass(frozen=True)
class Lookup:
    """One image's bank and what was found in it for null, each number of predictions, and copies."""

    some: UInt8[Tensor, "c h w 3"]
    """A few of the copies, for the picture."""
    nearest: UInt8[Tensor, "c h w 3"]
    """What the last z_inv retrieves, from the nearest on."""
    found: Neighbours
    nearest_strength: Float[Tensor, " s"]
    random_strength: float


def evaluate(subject: Subject, settings: Settings, output: Path) -> dict[str, Any]:
    """Retrieval and linear accuracy of each number of predictions; the picture lies beside `output`.

    Raises ConfigError for settings that cannot be, and for labels that are missing or all the same.
    """
    _check(subject, settings)
    numbers = tuple(map(str, settings.predictions))
    linear = _linear(subject, settings, (TEACHER, NULL, *numbers)) if settings.linear else None
    images, _ = subject.images(settings.bank.images)
    generators = torch.Generator().manual_seed(settings.seed), _of_actions(settings.seed)
    banks = [_look_up(subject, image, settings, *generators) for image in track(images, "banks", transient=True)]
    picture = output.with_suffix(".png")
    draw(banks[:PICTURED], settings.predictions[-1], picture)
    ranks = torch.stack([bank.found.ranks for bank in banks], dim=1).double()
    nearest = torch.stack([bank.nearest_strength for bank in banks], dim=1).double()
    names = (NULL, *numbers, COPIES)
    return {
        "images": len(banks),
        "bank": settings.bank.size,
        "predictions": list(settings.predictions),
        "clean": {
            "chance": chance(settings.bank.size + 1),
            "reciprocal_rank": dict(zip(names, map(over_images, 1 / ranks), strict=True)),
            "nearest": dict(zip(names, map(over_images, (ranks == 1).double()), strict=True)),
        },
        "strength": {
            "copies_averaged": settings.nearest,
            "of_nearest": dict(zip(names, map(over_images, nearest), strict=True)),
            "of_random": over_images(torch.tensor([bank.random_strength for bank in banks], dtype=torch.float64)),
        },
        "linear": linear,
        "paper": {str(n): TABLE_S6[n] for n in settings.predictions if n in TABLE_S6},
        "picture": picture.name,
    }


def _check(subject: Subject, settings: Settings) -> None:
    sizes, bank = settings.predictions, settings.bank
    if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
        raise ConfigError(f"--predictions {' '.join(map(str, sizes))}: rising numbers from 1 on, as 1 8 16 32 128")
    if bank.images < 2 or bank.size < 2 or bank.chunk < 1:
        raise ConfigError("--bank: images and size must be at least 2 and chunk at least 1")
    if not 1 <= settings.nearest <= bank.size:
        raise ConfigError(f"--nearest {settings.nearest}: from 1 to --bank.size {bank.size}")
    if max(bank_jitter(subject.config.views, bank.scenario).strengths) <= 0:
        raise ConfigError("the run's jitter changes nothing (its strengths are 0); say --bank.scenario default")


def _of_actions(seed: int) -> torch.Generator:
    """For the actions: with the banks' own generator the copies would be what the predictions are told."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, 1)).generate_state(1)[0]))


@torch.no_grad()
def _look_up(
    subject: Subject,
    image: UInt8[Tensor, "h w 3"],
    settings: Settings,
    copies_generator: torch.Generator,
    actions_generator: torch.Generator,
) -> Lookup:
    model, bank = subject.model, settings.bank
    jitter = bank_jitter(subject.config.views, bank.scenario)
    params = draw_photometric(jitter, bank.size, copies_generator).to(image.device)
    clean, embedded = image[None], embed_bank(model, image, params, bank.chunk)
    copies, targets = embedded.copies, embedded.targets.mean(1)
    marginals = _marginals(subject, clean, jitter, settings, actions_generator)[0]
    found = neighbours(
        model.targets(clean).float().mean(1)[0], targets, torch.cat([marginals, targets.mean(0, keepdim=True)])
    )
    strength = strengths(params, jitter)
    # The nearest among the copies alone: the clean image itself, of strength 0, is what the ranks are about.
    jittered = found.order[found.order > 0].view(len(found.order), -1) - 1
    near = strength[jittered[:, : settings.nearest]].mean(1)
    shown = torch.cat([clean, copies])[found.order[-2, :ACROSS]]
    return Lookup(copies[:ACROSS].cpu(), shown.cpu(), found, near, strength.mean().item())


@torch.no_grad()
def _marginals(
    subject: Subject,
    images: UInt8[Tensor, "b h w 3"],
    jitter: Photometric,
    settings: Settings,
    generator: torch.Generator,
) -> Float[Tensor, "b s d"]:
    """Pooled predictions of clean images: with the null action, then z_inv of each number of predictions."""
    features = subject.model.encode(images, "teacher")
    # Image by image, so that what an image is asked does not depend on how many are read at once.
    params = torch.stack([draw_photometric(jitter, max(settings.predictions), generator) for _ in images])
    nothing = torch.tensor(IDENTITY, device=images.device).expand(len(images), 1, -1)
    null = marginalise(subject.model, features, nothing, (1,), settings.bank.chunk)
    several = marginalise(subject.model, features, params.to(images.device), settings.predictions, settings.bank.chunk)
    return torch.cat([null, several], dim=1)


def _linear(subject: Subject, settings: Settings, names: Sequence[str]) -> dict[str, Any]:
    jitter = bank_jitter(subject.config.views, settings.bank.scenario)
    generator = _of_actions(settings.seed)

    def features(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        plain = subject.model.encode(images, "teacher").float().mean(1, keepdim=True)
        return torch.cat([plain, _marginals(subject, images, jitter, settings, generator)], dim=1)

    return linear_accuracy(subject, settings.probe, features, names, settings.seed)


def draw(banks: Sequence[Lookup], predictions: int, path: Path) -> None:
    """Write the picture as PNG: for each image some of its copies, and below them what the last z_inv retrieves."""
    figure = Figure(figsize=(1.05 * ACROSS + 1.2, 2.35 * len(banks)), layout="constrained", facecolor="white")
    axes = figure.subplots(2 * len(banks), ACROSS, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for (above, below), bank in zip(axes.reshape(len(banks), 2, ACROSS), banks, strict=True):
        for ax, copy in zip(above, bank.some, strict=False):
            ax.imshow(copy.numpy(), interpolation="nearest")
        places = bank.found.order[-2].tolist()
        for i, (ax, image) in enumerate(zip(below, bank.nearest, strict=False)):
            ax.imshow(image.numpy(), interpolation="nearest")
            ax.set_title(f"{i + 1}" if places[i] else f"{i + 1}: clean", fontsize=8, pad=2)
        for ax, words in ((above[0], "some copies"), (below[0], f"nearest to\nz_inv, N = {predictions}")):
            ax.text(-0.12, 0.5, words, transform=ax.transAxes, ha="right", va="center", fontsize=8, color="0.25")
    figure.savefig(path, dpi=150)


def head(result: dict[str, Any]) -> list[str]:
    """Columns of `lines`: N across, as in table S6."""
    return ["predictions (N)", *map(str, result["predictions"]), NULL]


def lines(result: dict[str, Any]) -> list[list[str]]:
    """The result as a table of words, under `head`; the paper's row is named as such."""
    columns = head(result)[1:]

    def line(words: str, scores: dict[str, dict[str, float]], times: float, digits: int, key: str) -> list[str]:
        return [words, *(f"{times * scores[column][key]:.{digits}f}" for column in columns)]

    clean, strength, linear = result["clean"], result["strength"], result["linear"]
    made = []
    if linear is not None:
        made.append(line("linear accuracy, %", linear["accuracy"], 100, 1, "mean"))
        made.append(line("± standard error", linear["accuracy"], 100, 1, "standard_error"))
        made.append(["paper's, ImageNet", *(f"{result['paper'].get(column, '')}" for column in columns)])
    made.append(line("clean, 1/rank", clean["reciprocal_rank"], 1, 2, "mean"))
    made.append(line("± standard error", clean["reciprocal_rank"], 1, 2, "standard_error"))
    made.append(line("clean nearest, %", clean["nearest"], 100, 0, "mean"))
    made.append(line("strength of nearest", strength["of_nearest"], 1, 2, "mean"))
    return made


def _score(score: dict[str, float], times: float, digits: int) -> str:
    return f"{times * score['mean']:.{digits}f}±{times * score['standard_error']:.{digits}f}"


def caption(result: dict[str, Any]) -> str:
    """What the figures are of, and what to compare them with."""
    clean, strength, linear = result["clean"], result["strength"], result["linear"]
    perfect = _score(clean["reciprocal_rank"][COPIES], 1, 2)
    text = (
        f"Retrieval among {result['bank']} jittered copies and the clean image, {result['images']} images. 1/rank: "
        f"chance {clean['chance']:.3f}, mean of the copies' own features {perfect}. "
        f"Strength: 0 unchanged to 1, of the {strength['copies_averaged']} nearest copies; of a random one "
        f"{strength['of_random']['mean']:.2f}."
    )
    if linear is None:
        return text
    return (
        f"{text} Linear accuracy: '{linear['label']}', {linear['classes']} classes, {linear['train_images']} training "
        f"and {linear['val_images']} held-out images; target encoder's own features "
        f"{_score(linear['accuracy'][TEACHER], 100, 1)}, always the commonest class {100 * linear['chance']:.1f}."
    )


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal, in the shape of table S6."""
    made = Table(
        title="Means of N predictions ± standard error", caption=caption(result), box=SIMPLE_HEAD, pad_edge=False
    )
    for i, column in enumerate(head(result)):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    for line in lines(result):
        made.add_row(*line)
    return made

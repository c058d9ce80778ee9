"""The retrieval pictures (paper, section 4.3, figures 1 and S5 to S8): what the predictor's output looks like.

A held-out photograph goes through the target encoder, the predictor applies an action, and of a bank of jittered
copies the one nearest to the prediction is shown beside the copy that the action truly makes. Photographs and actions
are chosen at random; a second picture has each one's best and worst prediction of all its bank's, and says so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from dali_pipelines.augmentation import Photometric
from dali_pipelines.replay import draw_photometric, photometric
from iwm.actions import describe
from iwm.config import ConfigError
from iwm.evaluation.bank import UNTOLD, actions_to, embed_bank, predicted_distances
from iwm.evaluation.mrr import BankSettings, bank_jitter, rank
from iwm.evaluation.settings import Settings as Common
from iwm.evaluation.subject import Subject
from iwm.models.world_model import WorldModel

EXTREMES = ("best", "worst")


@dataclass(frozen=True)
class Settings(Common):
    """Pictures: what the predictor's output retrieves. Writes RUN/eval/retrieval.png and retrieval-extremes.png."""

    bank: BankSettings = field(default_factory=lambda: BankSettings(images=6))
    actions: int = 3
    """Actions shown per photograph, drawn from its bank."""


@dataclass(frozen=True)
class Retrieval:
    """One prediction: the copy nearest to it and the copy it should be."""

    action: str
    rank: float
    """Of the true copy, 1 the nearest."""
    retrieved: UInt8[Tensor, "h w 3"]
    truth: UInt8[Tensor, "h w 3"]
    label: str = ""
    """Why it is shown, where that is not chance: best or worst."""


@dataclass(frozen=True)
class Row:
    """One photograph and its retrievals."""

    key: str
    source: UInt8[Tensor, "h w 3"]
    retrievals: list[Retrieval]


@dataclass(frozen=True)
class _Asked:
    """One photograph, all actions of its bank, and what the model made of them. Copies are made again when shown."""

    key: str
    image: UInt8[Tensor, "h w 3"]
    params: Float[Tensor, "k p"]
    ranks: Float[Tensor, " k"]
    nearest: Int[Tensor, " k"]
    missed_by: Float[Tensor, " k"]
    """Distance from the prediction to the true copy: what decides between equal ranks."""

    def row(self, model: WorldModel, which: Sequence[int], labels: Sequence[str]) -> Row:
        colour, index = model.config.views.colour, torch.tensor(which, device=self.image.device)
        actions = actions_to(self.params[index], model.action_spec)
        sources = self.image.expand(len(which), -1, -1, -1)
        truth, retrieved = (photometric(sources, self.params[i], colour).cpu() for i in (index, self.nearest[index]))
        retrievals = [
            Retrieval(describe(actions[i], model.action_spec), self.ranks[k].item(), retrieved[i], truth[i], label)
            for i, (k, label) in enumerate(zip(which, labels, strict=True))
        ]
        return Row(self.key, self.image.cpu(), retrievals)

    def extremes(self) -> list[int]:
        """The actions of the best and of the worst prediction; of equal ranks, the nearer and the farther one."""
        order = sorted(range(len(self.ranks)), key=lambda i: (self.ranks[i].item(), self.missed_by[i].item()))
        return [order[0], order[-1]]


@torch.no_grad()
def retrieve(subject: Subject, settings: Settings) -> tuple[list[Row], list[Row]]:
    """Choose photographs and actions at random by the seed, and look up every prediction in its bank.

    Returns a row per photograph with the actions chosen, and one with the best and the worst of all its bank's.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    images, keys = subject.random_images(settings.bank.images, generator)
    jitter = bank_jitter(subject.config.views, settings.bank.scenario)
    asked = [
        _ask(subject.model, image, key, jitter, settings.bank, generator)
        for image, key in zip(images, keys, strict=True)
    ]
    model = subject.model
    chosen_rows = [each.row(model, range(settings.actions), [""] * settings.actions) for each in asked]
    return chosen_rows, [each.row(model, each.extremes(), EXTREMES) for each in asked]


def _ask(
    model: WorldModel,
    image: UInt8[Tensor, "h w 3"],
    key: str,
    jitter: Photometric,
    settings: BankSettings,
    generator: torch.Generator,
) -> _Asked:
    params = draw_photometric(jitter, settings.size, generator).to(image.device)
    bank = embed_bank(model, image, params, settings.chunk)
    actions = actions_to(params, model.action_spec)[None]
    distances = predicted_distances(
        model, bank, image[None], actions, distances=("pooled",), contexts=("teacher",), chunk=settings.chunk
    )[:, :, 0]
    ranks = rank(distances, bank.norms[:1])[0, 0]
    return _Asked(key, image, params, ranks, distances[0, 0].argmin(dim=1), distances[0, 0].diagonal())


def draw(rows: list[Row], bank: int, path: Path) -> None:
    """Write the picture as PNG: a row per photograph, for each action the retrieved copy beside the true one."""
    actions = len(rows[0].retrievals)
    figure = Figure(
        figsize=(1.3 * (1 + 2.25 * actions), 1.95 * len(rows) + 0.2), layout="constrained", facecolor="white"
    )
    widths = [1.0, *([0.15, 1.0, 1.0] * actions)]
    axes = figure.subplots(len(rows), len(widths), squeeze=False, width_ratios=widths)
    for ax in axes.flat:
        ax.set_axis_off()
    for line, row in zip(axes, rows, strict=True):
        _show(line[0], row.source, "photograph")
        for a, retrieval in enumerate(row.retrievals):
            _show(line[3 * a + 2], retrieval.retrieved, "retrieved")
            _show(line[3 * a + 3], retrieval.truth, "truth")
            label = f"the {retrieval.label} of {bank} predictions\n" if retrieval.label else ""
            words = f"{label}{textwrap.fill(retrieval.action, 40)}\nrank {retrieval.rank:g} of {bank}"
            line[3 * a + 2].set_title(words, fontsize=7, loc="left", linespacing=1.3)
    figure.savefig(path, dpi=160)


def _show(ax: Axes, image: UInt8[Tensor, "h w 3"], caption: str) -> None:
    ax.imshow(image.numpy(), interpolation="nearest")
    ax.text(0.5, -0.04, caption, transform=ax.transAxes, ha="center", va="top", fontsize=7, color="0.35")


def evaluate(subject: Subject, settings: Settings, output: Path) -> dict[str, Any]:
    """Draw the pictures beside `output`; returns what they show: photographs' keys, actions and ranks."""
    if settings.actions < 1 or settings.actions > settings.bank.size:
        raise ConfigError(f"--actions {settings.actions}: from 1 to --bank.size {settings.bank.size}")
    chosen, extremes = retrieve(subject, settings)
    picture, picture_of_extremes = output.with_suffix(".png"), output.with_name(f"{output.stem}-extremes.png")
    draw(chosen, settings.bank.size, picture)
    draw(extremes, settings.bank.size, picture_of_extremes)
    return {
        "bank": settings.bank.size,
        "conditioning": subject.config.action.conditioning,
        "picture": picture.name,
        "photographs": [_record(row) for row in chosen],
        "extremes": {"picture": picture_of_extremes.name, "photographs": [_record(row) for row in extremes]},
    }


def _record(row: Row) -> dict[str, Any]:
    shown = [{"action": r.action, "rank": r.rank} | ({"label": r.label} if r.label else {}) for r in row.retrievals]
    return {"key": row.key, "actions": shown}


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal: first what was chosen at random, then each photograph's best and worst."""
    extremes = result["extremes"]
    made = Table(
        title=f"Retrieved among {result['bank']} copies: see {result['picture']} and {extremes['picture']}",
        caption=UNTOLD if result["conditioning"] == "none" else None,
        box=SIMPLE_HEAD,
    )
    for column in ("photograph", "shown as", "action", "rank of the truth"):
        made.add_column(column, justify="right" if column.startswith("rank") else "left")
    for row in (*result["photographs"], *extremes["photographs"]):
        for i, shown in enumerate(row["actions"]):
            label = f"{shown['label']} of {result['bank']}" if "label" in shown else f"random, seed {result['seed']}"
            made.add_row("" if i else row["key"], label, shown["action"], f"{shown['rank']:g}")
    return made

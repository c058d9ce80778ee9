"""The retrieval picture (paper, section 4.3 and figure 1): what the predictor's output looks like.

A held-out photograph goes through the target encoder, the predictor applies an action, and of a bank of jittered
copies the one nearest to the prediction is shown beside the copy that the action truly makes.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from dali_pipelines.augmentation import IDENTITY, Photometric
from dali_pipelines.replay import draw_photometric
from iwm.actions import action_between, describe
from iwm.config import ConfigError
from iwm.evaluation.mrr import CONTEXTS, DISTANCES, BankSettings, bank_jitter, embed_bank, rank
from iwm.evaluation.settings import Settings as Common
from iwm.evaluation.subject import Subject

DISTANCE, CONTEXT = DISTANCES.index("pooled"), CONTEXTS.index("teacher")

POOL = 256
"""Photographs are chosen among so many held-out images (or all, where there are fewer)."""


@dataclass(frozen=True)
class Settings(Common):
    """Picture: what the predictor's output retrieves. Writes RUN/eval/retrieval.png beside the JSON."""

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


@dataclass(frozen=True)
class Row:
    """One photograph and its retrievals."""

    key: str
    source: UInt8[Tensor, "h w 3"]
    retrievals: list[Retrieval]


@torch.no_grad()
def retrieve(subject: Subject, settings: Settings) -> list[Row]:
    """Choose photographs and actions at random by the seed, and look up every prediction in its bank."""
    generator = torch.Generator().manual_seed(settings.seed)
    images, keys = subject.images(POOL, at_least=settings.bank.images)
    chosen = torch.randperm(len(images), generator=generator)[: settings.bank.images].tolist()
    jitter = bank_jitter(subject.config.views, settings.bank.scenario)
    return [_row(subject, images[i], keys[i], jitter, settings, generator) for i in chosen]


def _row(
    subject: Subject,
    image: UInt8[Tensor, "h w 3"],
    key: str,
    jitter: Photometric,
    settings: Settings,
    generator: torch.Generator,
) -> Row:
    params = draw_photometric(jitter, settings.bank.size, generator).to(image.device)
    bank = embed_bank(subject.model, image, params, settings.bank.chunk)
    identity = torch.tensor(IDENTITY, device=params.device).expand_as(params)
    actions = action_between(identity, params, subject.model.action_spec)
    ranks = rank(bank.distances, bank.norms)[DISTANCE, CONTEXT]
    nearest = bank.distances[DISTANCE, CONTEXT].argmin(dim=1)
    retrievals = [
        Retrieval(
            describe(actions[i], subject.model.action_spec),
            ranks[i].item(),
            bank.copies[nearest[i]].cpu(),
            bank.copies[i].cpu(),
        )
        for i in range(settings.actions)
    ]
    return Row(key, image.cpu(), retrievals)


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
            words = textwrap.fill(retrieval.action, 40) + f"\nrank {retrieval.rank:g} of {bank}"
            line[3 * a + 2].set_title(words, fontsize=7, loc="left", linespacing=1.3)
    figure.savefig(path, dpi=160)


def _show(ax: Axes, image: UInt8[Tensor, "h w 3"], caption: str) -> None:
    ax.imshow(image.numpy(), interpolation="nearest")
    ax.text(0.5, -0.04, caption, transform=ax.transAxes, ha="center", va="top", fontsize=7, color="0.35")


def evaluate(subject: Subject, settings: Settings, output: Path) -> dict[str, Any]:
    """Draw the picture beside `output`; returns what it shows: per photograph its key, actions and ranks."""
    if settings.actions < 1 or settings.actions > settings.bank.size:
        raise ConfigError(f"--actions {settings.actions}: from 1 to --bank.size {settings.bank.size}")
    rows = retrieve(subject, settings)
    picture = output.with_suffix(".png")
    draw(rows, settings.bank.size, picture)
    shown = [
        {"key": row.key, "actions": [{"action": r.action, "rank": r.rank} for r in row.retrievals]} for row in rows
    ]
    return {"bank": settings.bank.size, "picture": picture.name, "photographs": shown}


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    made = Table(title=f"Retrieved among {result['bank']} copies: see {result['picture']}", box=SIMPLE_HEAD)
    for column in ("photograph", "action", "rank of the truth"):
        made.add_column(column, justify="right" if column.startswith("rank") else "left")
    for row in result["photographs"]:
        for i, shown in enumerate(row["actions"]):
            made.add_row("" if i else row["key"], shown["action"], f"{shown['rank']:g}")
    return made

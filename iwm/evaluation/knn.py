"""Nearest neighbours: a quick check of an encoder that trains nothing (Wu et al., 2018; k and temperature as in DINO).

A held-out image is given the class that most of its k nearest training images have, by cosine similarity of features
averaged over tokens, each vote weighing exp(similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from iwm.config import ConfigError
from iwm.evaluation.bank import CONTEXTS
from iwm.evaluation.labelled import LabelledImages, labelled_features
from iwm.evaluation.settings import Settings as Common
from iwm.evaluation.subject import Subject


@dataclass(frozen=True)
class Settings(LabelledImages, Common):
    """Accuracy of a vote among the nearest training images, of both encoders."""

    neighbours: tuple[int, ...] = (10, 20, 100)
    """k: how many vote."""
    temperature: float = 0.07
    """Above 0; small values leave the vote to the very nearest."""
    chunk: int = 256
    """Held-out images compared with all training images at once; lower it when the device runs out of memory."""


@torch.no_grad()
def vote(
    judged: Float[Tensor, "m d"],
    known: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    classes: int,
    neighbours: Sequence[int],
    temperature: float,
    chunk: int = 256,
) -> Int64[Tensor, "s m"]:
    """The class that each row of `judged` is given, for each of the numbers of neighbours; on the features' device."""
    known = F.normalize(known.float(), dim=1)
    parts = []
    for rows in F.normalize(judged.float(), dim=1).split(chunk):
        # The model's autocast would round similarities, which differ by little, to bf16.
        with torch.autocast(rows.device.type, enabled=False):
            similarity, nearest = (rows @ known.T).topk(max(neighbours), dim=1)
        weights = (similarity / temperature).exp().double()
        found = labels[nearest]
        votes = weights.new_zeros(len(rows), classes)
        winners = {
            k: votes.scatter_add(1, found[:, :k], weights[:, :k]).argmax(dim=1) for k in dict.fromkeys(neighbours)
        }
        parts.append(torch.stack([winners[k] for k in neighbours]))
    return torch.cat(parts, dim=1)


def evaluate(subject: Subject, settings: Settings, output: Path) -> dict[str, Any]:
    """Accuracy (0 to 1) with its standard error, by encoder and number of neighbours. Writes nothing itself.

    Raises ConfigError for settings that cannot be, and for labels that are missing or all the same.
    """
    ks = settings.neighbours
    if not ks or min(ks) < 1 or list(ks) != sorted(set(ks)):
        raise ConfigError(f"--neighbours {' '.join(map(str, ks))}: rising numbers from 1 on, as 10 20 100")
    if settings.temperature <= 0 or settings.chunk < 1:
        raise ConfigError("--temperature must be above 0 and --chunk at least 1")

    def features(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        return torch.stack([subject.model.encode(images, context).float().mean(1) for context in CONTEXTS], dim=1)

    data = labelled_features(subject, settings, features)
    if max(ks) > len(data.labels):
        raise ConfigError(f"--neighbours {max(ks)}: there are {len(data.labels)} training images; lower it")
    accuracies = {}
    for i, context in enumerate(CONTEXTS):
        given = vote(
            data.judged[:, i],
            data.known[:, i],
            data.labels,
            len(data.classes),
            ks,
            settings.temperature,
            settings.chunk,
        )
        right = (given == data.truths).double().mean(dim=1)
        errors = (right * (1 - right) / len(data.truths)).sqrt()
        scores = zip(ks, right.tolist(), errors.tolist(), strict=True)
        accuracies[context] = {str(k): {"mean": mean, "standard_error": error} for k, mean, error in scores}
    return {
        "label": settings.label,
        "classes": len(data.labels.unique()),
        "chance": data.chance,
        "train_images": len(data.labels),
        "val_images": len(data.truths),
        "accuracy": accuracies,
    }


def caption(result: dict[str, Any]) -> str:
    """What the figures are of, and what to compare them with."""
    return (
        f"'{result['label']}', {result['classes']} classes, neighbours among {result['train_images']} training images, "
        f"{result['val_images']} held-out images; always the commonest class {100 * result['chance']:.1f}."
    )


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    made = Table(title="Nearest neighbours, accuracy in % ± standard error", caption=caption(result), box=SIMPLE_HEAD)
    made.add_column("encoder")
    for k in result["accuracy"][CONTEXTS[0]]:
        made.add_column(f"k = {k}", justify="right")
    for context, scores in result["accuracy"].items():
        made.add_row(context, *(f"{100 * s['mean']:.1f}±{100 * s['standard_error']:.1f}" for s in scores.values()))
    return made

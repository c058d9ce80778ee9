"""Features of labelled images of the training split and the held-out split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from rich.progress import track
from torch import Tensor

from iwm.config import ConfigError
from iwm.evaluation.common import EvalContext
from iwm.evaluation.settings import LabelledImageSettings
from shards.errors import ShardError
from shards.format import load_manifest


@dataclass(frozen=True)
class LabelledFeatures:
    """s features of each image, and its class index."""

    classes: list[str]
    """Class names of the training split."""
    train: Float[Tensor, "n s d"]
    train_labels: Int64[Tensor, " n"]
    test: Float[Tensor, "m s d"]
    test_labels: Int64[Tensor, " m"]
    """Class indices; -1 for a class that the training split lacks, which counts as an error."""
    chance: float
    """Share of the majority class among the held-out images (0 to 1)."""

    def metadata(self) -> dict[str, Any]:
        """Return the entries of a result that describe the images: numbers of classes and images, and chance."""
        return {
            "classes": len(self.train_labels.unique()),
            "chance": self.chance,
            "train_images": len(self.train_labels),
            "val_images": len(self.test_labels),
        }


def extract_features(
    context: EvalContext,
    settings: LabelledImageSettings,
    features: Callable[[UInt8[Tensor, "b h w 3"]], Float[Tensor, "b s d"]],
    options: str = "--",
) -> LabelledFeatures:
    """Extract features of labelled images of the training split and the held-out split.

    Images are read in batches; only features stay in memory. Raises ConfigError for missing or constant labels; it
    names the option, which begins with `options`.
    """
    split, label = settings.train or context.config.data.train, settings.label
    classes, held_out_numbers = match_classes(context.shards, split, context.split, label, options)
    train, labels = _embed(context, split, label, settings.train_images, features)
    if len(labels.unique()) < 2:
        raise ConfigError(
            f"all {len(labels)} images of split '{split}' have one class of '{label}'; use another {options}label or "
            f"more {options}train-images"
        )
    test, numbers = _embed(context, context.split, label, settings.val_images, features)
    chance = numbers.bincount().max().item() / len(numbers)
    return LabelledFeatures(classes, train, labels, test, held_out_numbers.to(numbers.device)[numbers], chance)


def match_classes(
    shards: Path, train: str, held_out: str, label: str, options: str
) -> tuple[list[str], Int64[Tensor, " c"]]:
    """Return the training split's classes and, for each class of the held-out split, its index among them (or -1).

    Each split numbers its own classes, so one class may have two numbers. Raises ConfigError for a missing split or
    column, and for splits without a common class; it names the option, which begins with `options`.
    """
    try:
        classes, held_out_classes = (load_manifest(shards, split).column(label).classes for split in (train, held_out))
    except ShardError as error:
        raise ConfigError(f"{error}; use another {options}label or {options}train") from error
    if not set(classes) & set(held_out_classes):
        raise ConfigError(
            f"'{label}' of splits '{train}' and '{held_out}' of {shards} have no class in common; use another "
            f"{options}train"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, torch.tensor([numbers.get(name, -1) for name in held_out_classes])


@torch.no_grad()
def _embed(
    context: EvalContext,
    split: str,
    label: str,
    most: int | None,
    features: Callable[[UInt8[Tensor, "b h w 3"]], Float[Tensor, "b s d"]],
) -> tuple[Float[Tensor, "n s d"], Int64[Tensor, " n"]]:
    parts, labels = [], []
    for batch in track(context.iter_labelled(split, label, most), f"features of {split}", transient=True):
        assert batch.labels is not None  # the loader was given a label column
        parts.append(features(batch.images))
        labels.append(batch.labels.clone())
    return torch.cat(parts), torch.cat(labels)

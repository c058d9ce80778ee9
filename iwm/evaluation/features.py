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
from iwm.evaluation.held_out import HELD_OUT_REMEDY, MissingDataError, require_images, require_splits
from iwm.evaluation.settings import LabelledImageSettings
from shards.errors import ShardError
from shards.format import list_splits, load_manifest
from shards.listing import LABEL

LABELS_REMEDY = "make the shards from labelled images, see iwm shards --help"
"""Remedy for shards without labels."""


@dataclass(frozen=True)
class LabelledSplits:
    """Training split and held-out split of an evaluation that fits a classifier, and their classes."""

    train: str
    held_out: str
    label: str
    """Label column."""
    classes: list[str]
    """Class names of the training split."""
    held_out_numbers: Int64[Tensor, " c"]
    """Index of each class of the held-out split among `classes`; -1 for a class that they lack."""

    def metadata(self, train: Int64[Tensor, " n"], test: Int64[Tensor, " m"]) -> dict[str, Any]:
        """Return the entries of a result that describe the images: label, numbers of classes and images, chance.

        train, test: class numbers of the images of both splits, each split's own. Chance is the share of the majority
        class among the held-out images (0 to 1).
        """
        return {
            "label": self.label,
            "classes": len(train.unique()),
            "chance": test.bincount().max().item() / len(test),
            "train_images": len(train),
            "val_images": len(test),
        }

    def require_classes(self, labels: Int64[Tensor, " n"], options: str) -> None:
        """Raise MissingDataError where all training images have one class. options: beginning of the options."""
        if len(labels.unique()) < 2:
            raise MissingDataError(
                f"all {len(labels)} images of split '{self.train}' have one class of '{self.label}'; "
                f"use another {options}label or more {options}train-images"
            )

    def targets(self, held_out: Int64[Tensor, " m"]) -> Int64[Tensor, " m"]:
        """Return held-out images' indices among `classes`; -1 for one that the training split lacks, an error."""
        return self.held_out_numbers.to(held_out.device)[held_out]


@dataclass(frozen=True)
class LabelledFeatures:
    """s features of each image, and its class index."""

    splits: LabelledSplits
    train: Float[Tensor, "n s d"]
    train_labels: Int64[Tensor, " n"]
    test: Float[Tensor, "m s d"]
    test_numbers: Int64[Tensor, " m"]
    """Class numbers of the held-out split."""

    @property
    def test_labels(self) -> Int64[Tensor, " m"]:
        """Class indices of the held-out images (LabelledSplits.targets)."""
        return self.splits.targets(self.test_numbers)

    def metadata(self) -> dict[str, Any]:
        """Return the entries of a result that describe the images (LabelledSplits.metadata)."""
        return self.splits.metadata(self.train_labels, self.test_numbers)


def extract_features(
    context: EvalContext,
    settings: LabelledImageSettings,
    features: Callable[[UInt8[Tensor, "b h w 3"]], Float[Tensor, "b s d"]],
) -> LabelledFeatures:
    """Extract features of labelled images of the training split and the held-out split, into memory.

    Images are read in batches; only features stay in memory. Where a split has fewer images than requested, a note says
    so. Raises the errors of find_splits, and MissingDataError for a single class and fewer than two images.
    """
    splits = find_splits(context, settings, "--")
    train, labels = _embed(context, splits.train, splits.label, settings.train_images, features)
    splits.require_classes(labels, "--")
    test, numbers = _embed(context, splits.held_out, splits.label, settings.val_images, features)
    return LabelledFeatures(splits, train, labels, test, numbers)


def find_splits(context: EvalContext, settings: LabelledImageSettings, options: str) -> LabelledSplits:
    """Return the splits and classes that a classifier is fitted to and evaluated on.

    Raises MissingDataError where the data lack labels or a second split, and ConfigError for a label or training split
    that the settings name and the data lack. Messages name the option, which begins with `options`.
    """
    split, label, held_out = settings.train or context.config.data.train, settings.label or LABEL, context.data
    try:
        classes, numbers = match_classes(
            held_out.shards, split, held_out.split, label, f"{options}train", f"{options}label"
        )
    except MissingDataError as error:
        given = settings.train if split not in list_splits(held_out.shards) else settings.label
        if given is None:
            raise
        raise ConfigError(str(error)) from error
    if split == held_out.split:
        raise MissingDataError(
            f"the classifier would be fitted and evaluated on the same images, split '{split}'; use "
            f"{options}train NAME, {HELD_OUT_REMEDY}"
        )
    return LabelledSplits(split, held_out.split, label, classes, numbers)


def match_classes(
    shards: Path, train: str, held_out: str, label: str, train_option: str, label_option: str
) -> tuple[list[str], Int64[Tensor, " c"]]:
    """Return the training split's classes and, for each class of the held-out split, its index among them (or -1).

    Each split numbers its own classes, so one class may have two numbers. Raises MissingDataError for a missing split
    or column and for splits without a common class, ConfigError for a folder without shards. Messages name the option:
    train_option, --data.split or label_option.
    """
    require_splits(shards, train, held_out, train_option)
    try:
        manifests = [load_manifest(shards, split) for split in (train, held_out)]
    except ShardError as error:
        raise ConfigError(str(error)) from error
    columns = []
    for manifest in manifests:
        try:
            columns.append(manifest.column(label).classes)
        except ShardError as error:
            remedy = f"use another {label_option}" if manifest.columns else LABELS_REMEDY
            raise MissingDataError(f"{error}; {remedy}") from error
    classes, held_out_classes = columns
    if not set(classes) & set(held_out_classes):
        raise MissingDataError(
            f"'{label}' of splits '{train}' and '{held_out}' of {shards} have no class in common; "
            f"use another {train_option} or {label_option}"
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
    found = sum(map(len, labels))
    require_images(found, 2, context.data.shards, split)
    context.note_fewer(found, most, split, "labelled images")
    return torch.cat(parts), torch.cat(labels)

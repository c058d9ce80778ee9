"""Linear accuracy of several features of the same images: trained on one split, judged on the held-out one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from rich.progress import track
from torch import Tensor

from iwm.config import ConfigError
from iwm.evaluation.logistic import fit_best
from iwm.evaluation.subject import Subject
from shards.listing import LABEL
from shards.manifest import ShardError, load_manifest


@dataclass(frozen=True)
class LinearSettings:
    """The linear classifier's data and penalties."""

    label: str = LABEL
    """Label column of the shards."""
    train: str | None = None
    """Split that it is trained on; default: the run's own (data.train)."""
    train_images: int | None = 256
    """The first so many of it; None: all."""
    val_images: int | None = 128
    """Held-out images that it is judged on; None: all."""
    l2: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    """Penalties tried on a fifth of the training images that is left out (logistic.py says of what)."""


def linear_accuracy(
    subject: Subject,
    settings: LinearSettings,
    features: Callable[[UInt8[Tensor, "b h w 3"]], Float[Tensor, "b s d"]],
    names: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Top-1 accuracy, 0 to 1, of a linear classifier of each of the features that `features` gives of clean images.

    Returns label, classes, chance (share of the commonest class among the held-out), train_images, val_images, and for
    each of `names` (length s): mean, standard_error (over images), l2, iterations, gradient. Images come in batches;
    only their features are kept. Raises ConfigError that names the option where settings or labels do not allow it.
    """
    if any(most is not None and most < 2 for most in (settings.train_images, settings.val_images)):
        raise ConfigError("--probe: train-images and val-images must be at least 2, or None for all")
    if not settings.l2 or min(settings.l2) <= 0:
        raise ConfigError("--probe.l2: at least one penalty, all above 0")
    train = settings.train or subject.config.data.train
    classes, theirs = _classes(subject, train, settings.label)
    known, labels = _embed(subject, train, settings.label, settings.train_images, features)
    present = len(labels.unique())
    if present < 2:
        raise ConfigError(
            f"linear accuracy: all {len(labels)} images of split '{train}' have one class; name another --probe.label, "
            "more --probe.train-images, or say --no-linear"
        )
    judged, numbers = _embed(subject, subject.split, settings.label, settings.val_images, features)
    truths = theirs.to(numbers.device)[numbers]
    accuracies = {}
    for i, name in enumerate(names):
        classifier = fit_best(known[:, i], labels, len(classes), settings.l2, seed)
        accuracy = classifier.accuracy(judged[:, i], truths)
        accuracies[name] = {
            "mean": accuracy,
            "standard_error": (accuracy * (1 - accuracy) / len(truths)) ** 0.5,
            "l2": classifier.l2,
            "iterations": classifier.iterations,
            "gradient": classifier.gradient,
        }
    return {
        "label": settings.label,
        "classes": present,
        "chance": numbers.bincount().max().item() / len(truths),
        "train_images": len(labels),
        "val_images": len(truths),
        "accuracy": accuracies,
    }


def _classes(subject: Subject, train: str, label: str) -> tuple[list[str], Int64[Tensor, " c"]]:
    """The training split's classes, and for each class of the held-out split its place among them, -1 for none.

    A split numbers the classes that it has; a class that was never trained on is one that cannot be right.
    """
    try:
        known, theirs = (load_manifest(subject.shards, split).column(label).classes for split in (train, subject.split))
    except ShardError as error:
        raise ConfigError(
            f"linear accuracy: {error}; name others with --probe.label and --probe.train, or say --no-linear"
        ) from error
    if not set(known) & set(theirs):
        raise ConfigError(
            f"linear accuracy: '{label}' of splits '{train}' and '{subject.split}' of {subject.shards} have no class "
            "in common; name another --probe.train, or say --no-linear"
        )
    return known, torch.tensor([known.index(name) if name in known else -1 for name in theirs])


@torch.no_grad()
def _embed(
    subject: Subject,
    split: str,
    label: str,
    most: int | None,
    features: Callable[[UInt8[Tensor, "b h w 3"]], Float[Tensor, "b s d"]],
) -> tuple[Float[Tensor, "n s d"], Int64[Tensor, " n"]]:
    parts, labels = [], []
    for batch in track(subject.labelled(split, label, most), f"features of {split}", transient=True):
        assert batch.labels is not None  # the loader was given a label column
        parts.append(features(batch.images))
        labels.append(batch.labels.clone())
    return torch.cat(parts), torch.cat(labels)

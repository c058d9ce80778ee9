"""Linear accuracy of several features of the same images: trained on one split, judged on the held-out one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from iwm.config import ConfigError
from iwm.evaluation.labelled import LabelledImages, labelled_features
from iwm.evaluation.logistic import fit_best
from iwm.evaluation.subject import Subject


@dataclass(frozen=True)
class LinearSettings(LabelledImages):
    """The linear classifier's data and penalties."""

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
    if not settings.l2 or min(settings.l2) <= 0:
        raise ConfigError("--probe.l2: at least one penalty, all above 0")
    try:
        data = labelled_features(subject, settings, features, options="--probe.")
    except ConfigError as error:
        raise ConfigError(f"linear accuracy: {error}, or say --no-linear") from error
    accuracies = {}
    for i, name in enumerate(names):
        classifier = fit_best(data.known[:, i], data.labels, len(data.classes), settings.l2, seed)
        accuracy = classifier.accuracy(data.judged[:, i], data.truths)
        accuracies[name] = {
            "mean": accuracy,
            "standard_error": (accuracy * (1 - accuracy) / len(data.truths)) ** 0.5,
            "l2": classifier.l2,
            "iterations": classifier.iterations,
            "gradient": classifier.gradient,
        }
    return {
        "label": settings.label,
        "classes": len(data.labels.unique()),
        "chance": data.chance,
        "train_images": len(data.labels),
        "val_images": len(data.truths),
        "accuracy": accuracies,
    }

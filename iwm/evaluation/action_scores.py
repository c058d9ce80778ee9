"""Scores of inferred actions against the true ones, with standard errors over images.

Scores of a changed parameter, in its own unit: mean absolute error; Spearman's rank correlation of all pairs; share of
the pairs that are right within a tenth of the parameter's range in training. Score of a flag: balanced accuracy, the
mean of the accuracies where it is set and where it is not. Only entries that differ between the pairs are scored.

A rank correlation is no mean over images. Its standard error is the delete-one-image jackknife of the pooled pairs:
√((n − 1)/n · Σ(r₋ᵢ − mean r₋)²), where r₋ᵢ is the correlation without the pairs of image i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from iwm.action_space import ActionSpace
from iwm.evaluation.common import mean_and_stderr

WITHIN = 0.1
"""Share of the range of training within which an answer counts as right."""

Statistic = Callable[[NDArray[np.float64], NDArray[np.float64]], float]


def scored_entries(truth: Float[Tensor, "b k"], indices: tuple[int, ...]) -> list[int]:
    """Return those of these entries that differ between the pairs."""
    return [i for i in indices if bool((truth[:, i] != truth[0, i]).any())]


def score_actions(
    answers: Float[Tensor, "b k"], truth: Float[Tensor, "b k"], image_of: Int64[Tensor, " b"], space: ActionSpace
) -> dict[str, Any]:
    """Return the scores by entry: `parameters` and `flags`, each of them a mean with its standard error."""
    answers, truth, images = answers.double().cpu(), truth.double().cpu(), image_of.cpu()
    parameters, flags = {}, {}
    for i in scored_entries(truth, space.jitter):
        entry = space.entries[i]
        found, true = entry.change(answers[:, i]), entry.change(truth[:, i])
        errors = (found - true).abs()
        parameters[entry.name] = {
            "error": mean_and_stderr(per_image(errors, images)),
            "correlation": jackknife(rank_correlation, found.numpy(), true.numpy(), images.numpy()),
            "within_tenth": mean_and_stderr(per_image((errors <= WITHIN * entry.span).double(), images)),
        }
    for i in scored_entries(truth, space.flags):
        right = 1 - (answers[:, i] - truth[:, i]).abs()
        sides = [per_image(right[truth[:, i] == side], images[truth[:, i] == side]) for side in (0, 1)]
        flags[space.entries[i].name] = {"balanced_accuracy": mean_and_stderr((sides[0] + sides[1]) / 2)}
    return {"parameters": parameters, "flags": flags}


def per_image(values: Float[Tensor, " b"], image_of: Int64[Tensor, " b"]) -> Float[Tensor, " images"]:
    """Return the mean of the values of each image."""
    images, index = image_of.unique(return_inverse=True)
    sums = torch.zeros(len(images), dtype=torch.float64).index_add_(0, index, values.double())
    return sums / torch.bincount(index, minlength=len(images))


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation; 0 where all values of one side are equal."""
    ranks = [rankdata(values) for values in (a, b)]
    if any(np.ptp(values) == 0 for values in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def jackknife(
    statistic: Statistic, a: NDArray[np.float64], b: NDArray[np.float64], image_of: NDArray[np.int64]
) -> dict[str, float]:
    """Return a statistic of all pairs as `mean`, and its delete-one-image jackknife as `standard_error`."""
    without = np.array([statistic(a[image_of != i], b[image_of != i]) for i in np.unique(image_of)])
    variance = (len(without) - 1) * without.var()
    return {"mean": statistic(a, b), "standard_error": float(np.sqrt(variance))}

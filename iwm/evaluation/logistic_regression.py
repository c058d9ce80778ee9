"""Multinomial logistic regression on frozen features, solved to convergence with L-BFGS.

Features are standardised by the mean and standard deviation of the training set. The objective is

    mean cross-entropy + l2 / 2 · ‖weight‖²,

without a penalty on the biases. It is convex, and its minimum is unique up to a constant added to all biases, so there
is no schedule to tune. All values are float64 and stay on the features' device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy

from iwm.config import ConfigError
from iwm.evaluation.common import EvalContext, proportion_stderr
from iwm.evaluation.features import extract_features
from iwm.evaluation.held_out import MissingDataError
from iwm.evaluation.settings import LinearSettings

TOL = 1e-6
"""Convergence tolerance: largest entry of the objective's gradient."""

LOOSE_TOL = 1e-4
"""Tolerance for comparing penalties, which halves the number of iterations."""

MAX_ITER = 2000


@dataclass(frozen=True)
class LogisticRegression:
    """Solution of a logistic regression and its convergence."""

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    weight: Float[Tensor, "d c"]
    """Weights of the standardised features."""
    bias: Float[Tensor, " c"]
    l2: float
    iterations: int
    gradient: float
    """Largest entry of the objective's gradient at the solution; above TOL it has not converged."""

    def accuracy(self, features: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> float:
        """Return the share of samples whose most likely class is their label (0 to 1)."""
        logits = (features.double() - self.mean) / self.scale @ self.weight + self.bias
        return (logits.argmax(1) == labels).double().mean().item()


def fit(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    classes: int,
    l2: float,
    start: LogisticRegression | None = None,
    tolerance: float = TOL,
) -> LogisticRegression:
    """Solve for one `l2` > 0 until no entry of the gradient is above `tolerance`.

    The iteration starts from `start`, a solution on the same features, or from zeros.
    """
    features = features.double()
    mean, deviation = features.mean(0), features.std(0, correction=0)
    # A constant feature is 0 after centring, so its scale does not matter.
    scale = torch.where(deviation > 1e-9 * mean.abs(), deviation, 1.0)
    x = (features - mean) / scale
    weight, bias = (
        (start.weight.clone(), start.bias.clone())
        if start is not None
        else (x.new_zeros(x.shape[1], classes), x.new_zeros(classes))
    )
    weight.requires_grad_()
    bias.requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITER,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = cross_entropy(torch.addmm(bias, x, weight), labels) + l2 / 2 * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimiser.step(objective)
        objective()
    gradient = max(part.grad.abs().max().item() for part in (weight, bias) if part.grad is not None)
    iterations = optimiser.state[weight]["n_iter"]
    return LogisticRegression(mean, scale, weight.detach(), bias.detach(), l2, iterations, gradient)


def fit_with_validation(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    classes: int,
    grid: Sequence[float],
    seed: int = 0,
    validation_fraction: float = 0.2,
) -> LogisticRegression:
    """Select `l2` from `grid` by accuracy on a validation part of these samples, then solve on all of them.

    The validation part is a random share `validation_fraction` (0 to 1); it depends only on `seed` and the number of
    samples. With equal accuracies, the larger `l2` is selected.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    num_validation = max(1, round(validation_fraction * len(features)))
    validation, training = order[:num_validation], order[num_validation:]
    best, best_accuracy, solution = max(grid), -1.0, None
    for l2 in sorted(grid, reverse=True):
        solution = fit(features[training], labels[training], classes, l2, start=solution, tolerance=LOOSE_TOL)
        accuracy = solution.accuracy(features[validation], labels[validation])
        if accuracy > best_accuracy:
            best, best_accuracy = l2, accuracy
    return fit(features, labels, classes, best)


def linear_accuracy(
    context: EvalContext,
    settings: LinearSettings,
    features: Callable[[UInt8[Tensor, "b h w 3"]], Float[Tensor, "b s d"]],
    names: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Compute the top-1 accuracy (0 to 1) of a linear classifier on each of the s features that `features` returns.

    Returns label, classes, chance (share of the majority class among held-out images), train_images, val_images, and
    for each of `names` (length s): mean, standard_error (over images), l2, iterations, gradient. Images are read in
    batches; only features stay in memory. Raises ConfigError, which names the option, for invalid settings or labels,
    MissingDataError where the data lack labels or a second split.
    """
    if not settings.l2:
        raise ConfigError("--probe.l2: name at least one penalty")
    try:
        data = extract_features(context, settings, features, options="--probe.")
    except MissingDataError:
        raise
    except ConfigError as error:
        raise ConfigError(f"linear accuracy: {error}, or use --no-linear") from error
    accuracies = {}
    for i, name in enumerate(names):
        classifier = fit_with_validation(data.train[:, i], data.train_labels, len(data.classes), settings.l2, seed)
        accuracy = classifier.accuracy(data.test[:, i], data.test_labels)
        accuracies[name] = {
            "mean": accuracy,
            "standard_error": proportion_stderr(accuracy, len(data.test_labels)),
            "l2": classifier.l2,
            "iterations": classifier.iterations,
            "gradient": classifier.gradient,
        }
    return {**data.metadata(), "accuracy": accuracies}

"""Multinomial logistic regression on frozen features, solved to convergence with L-BFGS.

Features are standardised by the mean and standard deviation of the training set. The objective is

    mean cross-entropy + l2 / 2 · ‖weight‖²,

without a penalty on the biases. It is convex, and its minimum is unique up to a constant added to all biases, so there
is no schedule to tune. Every evaluation of objective and gradient is a sum over chunks of samples, which are read one
after another: the memory is that of a chunk, and the solution does not depend on how samples are divided. Sums and
solution are float64, on the chunks' device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

TOL = 1e-6
"""Convergence tolerance: largest entry of the objective's gradient."""

LOOSE_TOL = 1e-4
"""Tolerance for comparing penalties, which halves the number of iterations."""

MAX_ITER = 2000


@dataclass(frozen=True)
class Samples:
    """Samples of a data set, in chunks that can be iterated over any number of times."""

    chunks: Iterable[Float[Tensor, "_ d"]]
    """Features of all samples, in order."""
    labels: Int64[Tensor, " n"]
    """Class of each sample, on the chunks' device."""
    selected: Bool[Tensor, " n"] | None = None
    """Samples that are used; None: all."""

    def __len__(self) -> int:
        """Return the number of samples that are used."""
        return len(self.labels) if self.selected is None else int(self.selected.sum())

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "rows d"], Int64[Tensor, " rows"]]]:
        """Iterate over float64 features and labels of the samples that are used."""
        first = 0
        for chunk in self.chunks:
            rows = slice(first, first + len(chunk))
            first = rows.stop
            if self.selected is None:
                yield chunk.double(), self.labels[rows]
            else:
                chosen = self.selected[rows]
                yield chunk[chosen].double(), self.labels[rows][chosen]

    def select(self, selected: Bool[Tensor, " n"]) -> Samples:
        """Return some of the samples."""
        return Samples(self.chunks, self.labels, selected)


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

    def accuracy(self, samples: Samples) -> float:
        """Return the share of samples whose most likely class is their label (0 to 1)."""
        correct = sum(
            int((((features - self.mean) / self.scale @ self.weight + self.bias).argmax(1) == labels).sum())
            for features, labels in samples
        )
        return correct / len(samples)


def fit(
    samples: Samples,
    classes: int,
    l2: float,
    start: LogisticRegression | None = None,
    tolerance: float = TOL,
) -> LogisticRegression:
    """Solve for one `l2` > 0 until no entry of the gradient is above `tolerance`.

    The iteration starts from `start`, a solution on the same features, or from zeros.
    """
    count = len(samples)
    mean = _sum(features.sum(0) for features, _ in samples) / count
    deviation = (_sum((features - mean).square().sum(0) for features, _ in samples) / count).sqrt()
    # A constant feature is 0 after centring, so its scale does not matter.
    scale = torch.where(deviation > 1e-9 * mean.abs(), deviation, 1.0)
    weight, bias = (
        (start.weight.clone(), start.bias.clone())
        if start is not None
        else (mean.new_zeros(len(mean), classes), mean.new_zeros(classes))
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
        """Return the loss and add its gradient, chunk by chunk, so that no chunk's graph outlives it."""
        optimiser.zero_grad()
        penalty = l2 / 2 * weight.square().sum()
        torch.autograd.backward(penalty)
        loss = penalty.detach()
        for features, labels in samples:
            logits = torch.addmm(bias, (features - mean) / scale, weight)
            part = cross_entropy(logits, labels, reduction="sum") / count
            torch.autograd.backward(part)
            loss = loss + part.detach()
        return loss

    with torch.enable_grad():
        optimiser.step(objective)
        objective()
    gradient = max(part.grad.abs().max().item() for part in (weight, bias) if part.grad is not None)
    iterations = optimiser.state[weight]["n_iter"]
    return LogisticRegression(mean, scale, weight.detach(), bias.detach(), l2, iterations, gradient)


def fit_with_validation(
    samples: Samples, classes: int, grid: Sequence[float], seed: int = 0, validation_fraction: float = 0.2
) -> LogisticRegression:
    """Select `l2` from `grid` by accuracy on a validation part of these samples, then solve on all of them.

    The validation part is a random share `validation_fraction` (0 to 1); it depends only on `seed` and the number of
    samples. With equal accuracies, the larger `l2` is selected.
    """
    count = len(samples)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[order[: max(1, round(validation_fraction * count))]] = True
    held_out = held_out.to(samples.labels.device)
    training, validation = samples.select(~held_out), samples.select(held_out)
    best, best_accuracy, solution = max(grid), -1.0, None
    for l2 in sorted(grid, reverse=True):
        solution = fit(training, classes, l2, start=solution, tolerance=LOOSE_TOL)
        accuracy = solution.accuracy(validation)
        if accuracy > best_accuracy:
            best, best_accuracy = l2, accuracy
    return fit(samples, classes, best)


def _sum(parts: Iterable[Float[Tensor, " d"]]) -> Float[Tensor, " d"]:
    return reduce(torch.add, parts)

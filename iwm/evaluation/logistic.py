"""A linear classifier of fixed features: multinomial logistic regression, solved to convergence by L-BFGS.

With features standardised by the training set's mean and deviation, it minimises

    mean cross-entropy + l2 / 2 · ‖weight‖²,

biases left free. The problem is convex, so there is one answer and no schedule to tune. Everything is float64 and stays
on the features' device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

GRADIENT = 1e-6
"""Converged: no entry of the objective's gradient is larger."""

ROUGHLY = 1e-4
"""The same where penalties are only compared: about half of the iterations."""

MOST_ITERATIONS = 2000


@dataclass(frozen=True)
class Classifier:
    """A solution and how it was reached."""

    mean: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    weight: Float[Tensor, "d c"]
    """Of standardised features."""
    bias: Float[Tensor, " c"]
    l2: float
    iterations: int
    gradient: float
    """Largest entry of the objective's gradient at the solution; above GRADIENT it has not converged."""

    def accuracy(self, features: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> float:
        """Share of the features whose most likely class is their label."""
        logits = (features.double() - self.mean) / self.scale @ self.weight + self.bias
        return (logits.argmax(1) == labels).double().mean().item()


def fit(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    classes: int,
    l2: float,
    start: Classifier | None = None,
    tolerance: float = GRADIENT,
) -> Classifier:
    """Solve for one `l2` > 0 until no entry of the gradient is above `tolerance`, from `start` or from zeros.

    `start` is a solution of the same features.
    """
    features = features.double()
    mean, deviation = features.mean(0), features.std(0, correction=0)
    # A feature that never varies is 0 after centring, whatever it is divided by.
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
        max_iter=MOST_ITERATIONS,
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
    return Classifier(mean, scale, weight.detach(), bias.detach(), l2, iterations, gradient)


def fit_best(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    classes: int,
    grid: Sequence[float],
    seed: int = 0,
    held_out: float = 0.2,
) -> Classifier:
    """Choose `l2` among `grid` by accuracy on a part of these features that is left out, then solve on all of them.

    The part, a share `held_out` at random by `seed`, is the same for all features of so many samples. Of equal
    accuracies the larger `l2` is taken.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    apart = max(1, round(held_out * len(features)))
    judged, kept = order[:apart], order[apart:]
    best, best_accuracy, tried = max(grid), -1.0, None
    for l2 in sorted(grid, reverse=True):
        tried = fit(features[kept], labels[kept], classes, l2, start=tried, tolerance=ROUGHLY)
        accuracy = tried.accuracy(features[judged], labels[judged])
        if accuracy > best_accuracy:
            best, best_accuracy = l2, accuracy
    return fit(features, labels, classes, best)

"""The linear classifier is the minimiser of its objective, as an independent solver finds it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from iwm.evaluation.logistic_regression import TOL, Samples, fit, fit_with_validation


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor]:
    """Three overlapping classes of five features of very different scales."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (120,), generator=generator)
    features = torch.randn(120, 5, generator=generator, dtype=torch.float64)
    features[:, :3] += torch.nn.functional.one_hot(labels, 3)
    return features * torch.tensor([1.0, 50.0, 0.02, 1.0, 3.0]) + 7, labels


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_it_finds_the_minimum_that_scipy_finds(problem: tuple[Tensor, Tensor], l2: float) -> None:
    features, labels = problem
    x = features.numpy()
    x = (x - x.mean(0)) / x.std(0)
    y = labels.numpy()

    def objective(parameters: np.ndarray) -> float:
        weight, bias = parameters[:15].reshape(5, 3), parameters[15:]
        logits = x @ weight + bias
        highest = logits.max(1, keepdims=True)
        log_sum = np.log(np.exp(logits - highest).sum(1)) + highest[:, 0]
        return float((log_sum - logits[np.arange(len(y)), y]).mean() + l2 / 2 * (weight**2).sum())

    oracle = minimize(objective, np.zeros(18), method="BFGS", options={"gtol": 1e-7})
    found = fit(Samples([features], labels), 3, l2)
    assert np.allclose(found.weight.numpy(), oracle.x[:15].reshape(5, 3), atol=1e-4)
    assert objective(np.concatenate([found.weight.flatten(), found.bias])) <= oracle.fun + 1e-10
    assert found.gradient <= TOL
    assert found.iterations > 3


def test_it_converges_where_the_classes_can_be_separated_exactly() -> None:
    labels = torch.arange(60) % 4
    features = torch.nn.functional.one_hot(labels, 4).float()
    found = fit(Samples([features], labels), 4, 1e-5)
    assert found.gradient <= TOL
    assert found.accuracy(Samples([features], labels)) == 1


def test_the_scale_of_features_and_one_that_never_varies_change_nothing(problem: tuple[Tensor, Tensor]) -> None:
    features, labels = problem
    dead = torch.full((len(features), 1), 1e4, dtype=torch.float64)
    one = fit(Samples([features], labels), 3, 0.01)
    other = fit(Samples([torch.cat([features * 1e3 - 5, dead], dim=1)], labels), 3, 0.01)
    assert torch.allclose(one.weight, other.weight[:5], atol=1e-5)
    assert torch.equal(other.weight[5], torch.zeros(3, dtype=torch.float64))


def test_features_of_noise_classify_at_chance_and_take_the_strongest_penalty() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (600,), generator=generator)
    features = torch.randn(600, 20, generator=generator)
    found = fit_with_validation(Samples([features[:400]], labels[:400]), 4, (1e-3, 10.0))
    chance = 1 / 4
    assert abs(found.accuracy(Samples([features[400:]], labels[400:])) - chance) < 3 * math.sqrt(
        chance * (1 - chance) / 200
    )


def test_the_penalty_is_chosen_by_what_is_left_out_and_the_solution_is_of_all(problem: tuple[Tensor, Tensor]) -> None:
    features, labels = problem
    found = fit_with_validation(Samples([features], labels), 3, (0.01, 1e3))
    assert found.l2 == 0.01
    assert torch.allclose(found.weight, fit(Samples([features], labels), 3, 0.01).weight, atol=1e-5)


def test_it_is_exact_under_autocast(problem: tuple[Tensor, Tensor]) -> None:
    features, labels = problem
    exact = fit(Samples([features.float()], labels), 3, 0.01)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(fit(Samples([features.float()], labels), 3, 0.01).weight, exact.weight)


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_the_solution_does_not_depend_on_the_chunks(problem: tuple[Tensor, Tensor], rows: int) -> None:
    features, labels = problem
    whole, parts = Samples([features], labels), Samples(features.split(rows), labels)
    for one, other in (
        (fit(whole, 3, 0.01), fit(parts, 3, 0.01)),
        (fit_with_validation(whole, 3, (1e-3, 0.1), 5), fit_with_validation(parts, 3, (1e-3, 0.1), 5)),
    ):
        assert torch.allclose(one.weight, other.weight, atol=1e-8)
        assert torch.allclose(one.scale, other.scale, rtol=1e-12)
        assert (one.l2, one.accuracy(whole)) == (other.l2, other.accuracy(parts))


def test_selected_samples_are_fitted_as_if_there_were_no_others(problem: tuple[Tensor, Tensor]) -> None:
    features, labels = problem
    selected = torch.arange(len(labels)) % 3 > 0
    among_all = fit(Samples(features.split(11), labels, selected), 3, 0.01)
    alone = fit(Samples([features[selected]], labels[selected]), 3, 0.01)
    assert torch.allclose(among_all.weight, alone.weight, atol=1e-8)

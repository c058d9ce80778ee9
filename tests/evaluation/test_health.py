"""RankMe and feature deviation tell live features from collapsed ones."""

import math

import pytest
import torch

from iwm.evaluation.health import feature_std, rankme


def test_rankme_is_the_number_of_equally_used_directions() -> None:
    features = torch.zeros(64, 16)
    features[torch.arange(64), torch.arange(64) % 5] = 3.0
    assert rankme(features).item() == pytest.approx(5, rel=1e-3)


def test_rankme_of_two_unequal_directions_is_the_exponential_of_their_entropy() -> None:
    features = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(features).item() == pytest.approx(math.exp(entropy), rel=1e-4)


def test_rankme_of_collapsed_features_is_one() -> None:
    assert rankme(torch.ones(32, 8)).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_rankme_of_broken_features_is_nan_and_does_not_raise(broken: float) -> None:
    features = torch.randn(16, 4)
    features[3, 2] = broken
    assert math.isnan(rankme(features).item())


def test_feature_std_averages_the_deviation_of_each_dimension() -> None:
    features = torch.tensor([[0.0, 5.0, 1.0], [2.0, 5.0, 5.0]])
    assert feature_std(features).item() == pytest.approx((math.sqrt(2) + 0 + math.sqrt(8)) / 3)


def test_feature_std_ignores_the_mean_so_a_constant_is_a_collapse() -> None:
    assert feature_std(torch.full((10, 4), 7.0)).item() == 0

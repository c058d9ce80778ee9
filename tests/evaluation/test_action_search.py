"""Searches find a known action of a predictor that is reasoned about; scores on known numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from dali_pipelines.augmentations import IDENTITY, JITTER_OPS, PhotometricConfig
from dali_pipelines.replay import sample_photometric
from dali_pipelines.views import SCENARIOS, Views
from iwm.action_space import ActionSpace, action_space
from iwm.actions import action_between, action_spec
from iwm.config import Config, ConfigError
from iwm.evaluation.action_pairs import blind_guess, pair_kinds, sample_pairs
from iwm.evaluation.action_regressor import fit_regressor
from iwm.evaluation.action_scores import jackknife, rank_correlation, score_actions
from iwm.evaluation.action_settings import RegressorSettings
from iwm.model_config import ActionConfig
from iwm.models.action_energy import ActionEnergy
from iwm.models.action_search import search_by_gradient
from iwm.models.cross_entropy import search_by_cem
from iwm.search_settings import CEMSettings, GradientSettings

CONFIG = Config(views=Views(size=16))
SPEC = action_spec(CONFIG.action, CONFIG.views)
B, TOKENS, WIDTH = 12, 3, 16


def _space(config: Config = CONFIG) -> ActionSpace:
    return action_space(config, action_spec(config.action, config.views))


def _known(pooled: bool) -> tuple[ActionEnergy, Tensor]:
    """Return pairs of a predictor that adds a curved function of the action to its context, and the true actions."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(SPEC.size, WIDTH, generator=generator)
    contexts = torch.randn(4, TOKENS, WIDTH, generator=generator)

    def predict(context: Tensor, action: Tensor) -> Tensor:
        return context + torch.tanh(action @ weights / 4)[:, None] + 0.1 * (action @ weights)[:, None].square()

    space = _space()
    truth = space.at(0.1 + 0.8 * torch.rand(B, SPEC.size, generator=generator))
    source_of = torch.arange(B) % 4
    targets = predict(contexts[source_of], truth)
    return ActionEnergy(predict, contexts, source_of, targets, pooled, batch_size=7), truth


@pytest.mark.parametrize("pooled", [True, False])
def test_descent_finds_the_true_action_with_its_flags(pooled: bool) -> None:
    energy, truth = _known(pooled)
    coarse, found = search_by_gradient(energy, _space(), GradientSettings(points=512, starts=4, steps=80, rate=0.1))
    flags = list(_space().flags)
    assert torch.equal(found.actions[:, flags], truth[:, flags])
    torch.testing.assert_close(found.actions, truth, atol=0.02, rtol=0)
    assert (found.distances < 0.05).all()
    assert (found.distances <= coarse.distances).all()
    assert (coarse.actions - truth).abs().max() > 0.3  # the lattice alone does not suffice


def test_the_cross_entropy_method_finds_the_true_action_with_its_flags() -> None:
    energy, truth = _known(pooled=True)
    settings = CEMSettings(samples=300, elites=20, rounds=12, least_deviation=0.001)
    found = search_by_cem(energy, _space(), settings, seed=1)
    flags = list(_space().flags)
    assert torch.equal(found.actions[:, flags], truth[:, flags])
    torch.testing.assert_close(found.actions, truth, atol=0.1, rtol=0)
    again = search_by_cem(energy, _space(), settings, seed=1)
    assert torch.equal(again.actions, found.actions)
    assert not torch.equal(search_by_cem(energy, _space(), settings, seed=2).actions, found.actions)


def test_the_answer_of_a_pair_does_not_depend_on_the_others() -> None:
    energy, _ = _known(pooled=True)
    alone = ActionEnergy(energy.predict, energy.contexts[:1], energy.source_of[:1], energy.targets[:1], pooled=True)
    for search in (
        lambda energy: search_by_gradient(energy, _space(), GradientSettings(steps=6))[1],
        lambda energy: search_by_cem(energy, _space(), CEMSettings(rounds=2)),
    ):
        torch.testing.assert_close(search(alone).actions[0], search(energy).actions[0], atol=1e-4, rtol=0)


def test_a_wrong_flag_of_the_start_is_flipped() -> None:
    energy, truth = _known(pooled=False)
    flags = list(_space().flags)
    settings = GradientSettings(points=512, starts=1, steps=80, rate=0.1)
    lattice = _space().lattice(settings.points, energy.device)
    started = lattice[energy.from_each(lattice).argmin(1)][:, flags]
    _, found = search_by_gradient(energy, _space(), settings)
    wrong = (started != truth[:, flags]).sum(1) == 1
    assert (found.actions[wrong][:, flags] == truth[wrong][:, flags]).all(1).sum() >= 2


def test_predictions_are_counted_and_a_shared_source_is_predicted_once_per_point() -> None:
    energy, _ = _known(pooled=True)
    lattice = _space().lattice(50, energy.device)
    everywhere = energy.from_each(lattice)
    assert energy.predictions == 4 * len(lattice)
    one = energy.distances(torch.full((len(lattice),), 5), lattice)
    torch.testing.assert_close(everywhere[5], one)


def test_the_space_is_that_of_training() -> None:
    space = _space()
    assert [space.entries[i].name for i in space.jitter] == ["brightness", "contrast", "saturation", "hue"]
    assert [space.entries[i].name for i in space.flags] == ["source_grayscale", "source_blur", "source_solarize"]
    assert space.entries[0].span == pytest.approx(1.6)
    assert space.entries[3].span == pytest.approx(0.4 * 360)
    lattice = space.lattice(100, torch.device("cpu"))
    assert len(lattice) == 100
    assert not lattice[0].any()
    low, high = space.bounds(lattice.device)
    assert ((lattice >= low) & (lattice <= high)).all()
    assert set(lattice[:, 4:].unique().tolist()) == {0.0, 1.0}
    only_flags = _space(replace(CONFIG, views=replace(SCENARIOS["destructive"], size=16)))
    assert only_flags.jitter == ()
    assert len(only_flags.lattice(100, torch.device("cpu"))) == 2**3
    still = replace(
        CONFIG, views=replace(CONFIG.views, source=PhotometricConfig(hue=0.0), target=PhotometricConfig(hue=0.0))
    )
    assert [_space(still).entries[i].name for i in _space(still).jitter] == ["brightness", "contrast", "saturation"]


@pytest.mark.parametrize("encoding", ["difference", "log_ratio"])
def test_an_action_applied_to_its_source_gives_the_target(encoding: str) -> None:
    config = replace(CONFIG, action=ActionConfig(jitter_encoding=encoding))  # type: ignore[arg-type]  # a parameter
    spec = action_spec(config.action, config.views)
    generator = torch.Generator().manual_seed(0)
    source = sample_photometric(config.views.source, 50, generator)
    target = sample_photometric(config.views.target, 50, generator)
    reached = _space(config).applied(source, action_between(source, target, spec))
    torch.testing.assert_close(reached, target, atol=1e-5, rtol=0)
    change = _space(config).entries[0].change(action_between(source, target, spec)[:, 0])
    expected = target[:, 0] - source[:, 0] if encoding == "difference" else target[:, 0] / source[:, 0] - 1
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (replace(CONFIG, action=ActionConfig(conditioning="none")), "conditioning none.*use a run"),
        (replace(CONFIG, views=replace(SCENARIOS["ijepa"], size=16)), "never differed.*use a run"),
    ],
)
def test_a_run_without_actions_is_refused(config: Config, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _space(config)


def test_pairs_have_every_op_in_half_of_each_images_pairs(smooth_images: Tensor) -> None:
    pairs = sample_pairs(smooth_images, "destructive", CONFIG.views, SPEC, 4, torch.Generator().manual_seed(0))
    flags = pairs.actions[:, 4:].view(len(smooth_images), 4, 3)
    assert (flags.mean(1) == 0.5).all()
    assert (pairs.target_params[:, len(JITTER_OPS) :] == 0).all()
    assert (pairs.source_params[:, :4] != torch.tensor(IDENTITY[:4])).all()
    few = sample_pairs(smooth_images[:2], "destructive", CONFIG.views, SPEC, 4, torch.Generator().manual_seed(0))
    assert torch.equal(few.actions, pairs.actions[:8])
    clean = sample_pairs(smooth_images, "clean", CONFIG.views, SPEC, 3, torch.Generator().manual_seed(0))
    assert torch.equal(clean.sources, smooth_images)
    assert not clean.actions[:, 4:].any()
    assert (clean.actions[:, :4] != 0).all()


def test_kinds_of_pairs_and_the_blind_guess_follow_the_runs_views() -> None:
    assert pair_kinds(CONFIG.views) == ("clean", "destructive")
    assert pair_kinds(SCENARIOS["jitter"]) == ("clean",)
    assert pair_kinds(SCENARIOS["destructive"]) == ("destructive",)
    assert pair_kinds(SCENARIOS["ijepa"]) == ()
    guess = blind_guess("destructive", CONFIG.views, SPEC, _space())
    assert guess.tolist() == [0, 0, 0, 0, 0.5, 0.5, 0.5]
    wide = replace(CONFIG.views, target=replace(CONFIG.views.target, brightness=2.0))
    spec = action_spec(CONFIG.action, wide)
    # Factors from 0 to 3: their middle is 1.5, and the scale is 2.
    assert blind_guess("clean", wide, spec, _space(replace(CONFIG, views=wide)))[0].item() == pytest.approx(0.25)


def test_scores_on_known_numbers() -> None:
    truth = torch.zeros(6, SPEC.size)
    truth[:, 3] = torch.tensor([-1.0, 1.0, 0.5, -0.5, 0.2, -0.2])
    truth[:, 4] = torch.tensor([0.0, 1.0] * 3)
    answers = truth.clone()
    answers[:, 3] += torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.5])
    answers[:, 4] = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    scores = score_actions(answers, truth, torch.tensor([0, 0, 1, 1, 2, 2]), _space())
    assert list(scores["parameters"]) == ["hue"]
    hue = scores["parameters"]["hue"]
    # Half of the pairs are off by half of the scale, 0.1 turns: 18 degrees. A tenth of the range is 14.4.
    assert hue["error"]["mean"] == pytest.approx(9, abs=1e-4)
    assert hue["error"]["standard_error"] == pytest.approx(0, abs=1e-4)
    assert hue["within_tenth"]["mean"] == pytest.approx(0.5)
    assert list(scores["flags"]) == ["source_grayscale"]
    accuracy = scores["flags"]["source_grayscale"]["balanced_accuracy"]
    assert accuracy["mean"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert accuracy["standard_error"] == pytest.approx(0.5 / math.sqrt(3))
    guess = torch.full_like(truth, 0.5)
    blind = score_actions(guess, truth, torch.tensor([0, 0, 1, 1, 2, 2]), _space())
    assert blind["flags"]["source_grayscale"]["balanced_accuracy"] == {"mean": 0.5, "standard_error": 0.0}
    assert blind["parameters"]["hue"]["correlation"] == {"mean": 0.0, "standard_error": 0.0}


def test_the_jackknife_of_a_mean_is_its_standard_error_and_ranks_are_spearmans() -> None:
    rng = np.random.default_rng(0)
    values, images = rng.normal(size=40), np.repeat(np.arange(10), 4)
    found = jackknife(lambda a, _: float(a.mean()), values, values, images)
    means = values.reshape(10, 4).mean(1)
    assert found["standard_error"] == pytest.approx(means.std(ddof=1) / math.sqrt(10))
    other = values + rng.normal(size=40)
    assert rank_correlation(values, other) == pytest.approx(spearmanr(values, other).statistic)
    assert rank_correlation(np.round(values), other) == pytest.approx(spearmanr(np.round(values), other).statistic)
    without = [spearmanr(values[images != i], other[images != i]).statistic for i in range(10)]
    expected = math.sqrt(9 / 10 * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert jackknife(rank_correlation, values, other, images)["standard_error"] == pytest.approx(expected)


def test_the_regressor_learns_what_its_inputs_tell() -> None:
    generator = torch.Generator().manual_seed(0)
    space = _space()
    actions = space.at(torch.rand(2000, SPEC.size, generator=generator))
    inputs = actions @ torch.randn(SPEC.size, 10, generator=generator)
    image_of = torch.arange(500).repeat_interleave(4)
    torch.manual_seed(0)
    settings = RegressorSettings(width=64, epochs=60, penalties=(1e-3,))
    regressor = fit_regressor(inputs, actions, image_of, space, settings)
    answers = regressor.answer(inputs[image_of % 5 == 0])
    truth = actions[image_of % 5 == 0]
    assert (answers[:, 4:] == truth[:, 4:]).double().mean() > 0.9
    assert (answers[:, :4] - truth[:, :4]).abs().mean() < 0.5 * truth[:, :4].abs().mean()

"""MRR says 1 of a perfect world model, chance of a blind one, and nothing good of a collapsed or broken one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dali_pipelines.augmentations import IDENTITY, PHOTOMETRIC_FIELDS
from dali_pipelines.replay import sample_photometric
from dali_pipelines.views import SCENARIOS
from iwm.config import Config
from iwm.evaluation.bank import actions_from, chance_mrr, derangement, embed_bank, predicted_distances, rank_of_target
from iwm.evaluation.common import EvalContext
from iwm.evaluation.mrr import Ranks, compute_ranks, evaluate, summarise, tables
from iwm.evaluation.settings import BankSettings, MRRSettings, bank_augmentation, jitter_by_op
from iwm.models.world_model import WorldModel
from tests.evaluation.oracles import VIEWS, Blind, Oracle, context_of


class Collapsed(Oracle):
    """Every image has the same features, up to what float32 rounding leaves."""

    def target_features(self, images: Tensor) -> Tensor:
        noise = 1 + 1e-7 * torch.randn(len(images), 16, 1, generator=torch.Generator().manual_seed(1))
        return torch.linspace(-3, 3, 48).expand(len(images), 16, -1) * noise


class Broken(Oracle):
    def predict(self, context: Tensor, action: Tensor) -> Tensor:
        return torch.full_like(context, math.nan)


@pytest.fixture(scope="module")
def images(smooth_images: Tensor) -> Tensor:
    return smooth_images


def test_a_perfect_world_model_scores_near_one_and_shuffled_actions_near_chance(images: Tensor) -> None:
    result = summarise(compute_ranks(Oracle(), images, BankSettings(num_views=256)))
    for distance in ("pooled", "per_token"):
        for context in ("teacher", "student"):
            assert result["mrr"][distance][context]["mean"] > 0.97
            assert result["shuffled_actions"][distance][context]["mean"] < 0.035
            assert result["recall"]["at_1"][distance][context]["mean"] > 0.95
    assert result["chance"] == pytest.approx(0.0239, abs=5e-5)
    assert (result["images"], result["bank"]) == (6, 256)


def test_a_model_blind_to_the_action_scores_chance(images: Tensor) -> None:
    result = summarise(compute_ranks(Blind(), images, BankSettings(num_views=64)))
    for distance in ("pooled", "per_token"):
        assert result["mrr"][distance]["teacher"]["mean"] == pytest.approx(chance_mrr(64), rel=0.05)


def test_a_collapsed_model_gets_the_mean_rank_and_not_luck(images: Tensor) -> None:
    ranks = compute_ranks(Collapsed(), images, BankSettings(num_views=32)).actions
    assert torch.equal(ranks, torch.full_like(ranks, 16.5))


def test_a_model_that_gives_nan_scores_nan(images: Tensor) -> None:
    ranks = compute_ranks(Broken(), images, BankSettings(num_views=8))
    assert ranks.actions.isnan().all()
    assert math.isnan(summarise(ranks)["mrr"]["pooled"]["teacher"]["mean"])


def test_rank_counts_nearer_entries_and_shares_ties() -> None:
    distances = torch.tensor(
        [
            [0.1, 0.2, 0.3, 0.4],  # nearest of all: 1
            [0.2, 0.2, 0.1, 0.4],  # one nearer, tied with one other: 2.5
            [0.1, 0.2, 0.9, 0.4],  # the farthest: 4
            [0.5, 0.5, 0.5, 0.5],  # all tied: 2.5
        ]
    )
    ranks = rank_of_target(distances.expand(2, 2, -1, -1), torch.ones(2, 4))
    assert ranks.shape == (2, 2, 4)
    assert ranks[1, 0].tolist() == [1, 2.5, 4, 2.5]


def test_ties_are_judged_against_the_size_of_the_features() -> None:
    distances = torch.tensor([[0.5, 0.49999], [0.0, 0.5]]).expand(2, 2, -1, -1)
    assert rank_of_target(distances, torch.full((2, 2), 1.0))[0, 0, 0] == 2
    assert rank_of_target(distances, torch.full((2, 2), 100.0))[0, 0, 0] == 1.5


def test_derangement_uses_every_action_once_and_leaves_none_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 64):
        for _ in range(20):
            permutation = derangement(size, generator)
            assert sorted(permutation.tolist()) == list(range(size))
            assert not (permutation == torch.arange(size)).any()


def test_standard_error_is_over_images_not_over_copies() -> None:
    ranks = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [4.0, 4.0, 4.0, 4.0]]).expand(2, 2, 3, 4)
    score = summarise(Ranks(ranks, ranks))["mrr"]["pooled"]["student"]
    values = [1.0, 0.5, 0.25]
    mean = sum(values) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert score["mean"] == pytest.approx(mean)
    assert score["standard_error"] == pytest.approx(deviation / math.sqrt(3))


def test_recall_counts_copies_ranked_among_the_first() -> None:
    ranks = torch.tensor([[1.0, 5.0], [6.0, 2.0]]).expand(2, 2, 2, 2)
    recall = summarise(Ranks(ranks, ranks))["recall"]
    assert recall["at_1"]["per_token"]["teacher"]["mean"] == 0.25
    assert recall["at_5"]["per_token"]["teacher"]["mean"] == 0.75


def test_chance_is_the_harmonic_number_over_the_bank() -> None:
    assert chance_mrr(1) == 1
    assert chance_mrr(4) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_distances_are_the_plain_euclidean_ones_and_chunks_change_nothing(images: Tensor) -> None:
    torch.manual_seed(0)
    config = Config(views=VIEWS)
    model = _small(config)
    params = sample_photometric(bank_augmentation(VIEWS), 24, torch.Generator().manual_seed(0))
    bank, in_parts = (embed_bank(model, images[0], params, batch_size=chunk) for chunk in (24, 7))
    assert torch.allclose(bank.targets, in_parts.targets, atol=1e-5)
    actions = actions_from(params, model.action_spec)[None]
    distances, in_chunks = (
        predicted_distances(model, bank, images[:1], actions, batch_size=chunk) for chunk in (24, 7)
    )
    assert torch.allclose(distances, in_chunks, atol=1e-4)

    flags = params[:, [PHOTOMETRIC_FIELDS.index(name) for name in ("grayscale", "blur_sigma", "solarize")]]
    action = torch.cat([params[:, :4] - torch.tensor(IDENTITY[:4]), flags], 1)
    action[:, :4] /= torch.tensor(model.action_spec.scale)
    with torch.no_grad():
        targets = model.target_features(bank.views)
        for c, context in enumerate(("teacher", "student")):
            features = model.encode(images[:1], context)
            for i in (0, 11, 23):
                prediction = model.predict(features, action[i : i + 1])
                per_token = (prediction - targets).flatten(1).norm(dim=1)
                pooled = (prediction.mean(1) - targets.mean(1)).norm(dim=1)
                assert torch.allclose(distances[1, c, 0, i].float(), per_token, atol=1e-4)
                assert torch.allclose(distances[0, c, 0, i].float(), pooled, atol=1e-4)


def _small(config: Config) -> WorldModel:
    from dataclasses import replace

    narrow = replace(config, encoder=replace(config.encoder, embed_dim=48, depth=2, num_heads=2, patch_size=4))
    narrow = replace(narrow, predictor=replace(config.predictor, embed_dim=48, depth=1, num_heads=2))
    model = WorldModel(narrow)
    model.update_target(0.5)
    for parameter in model.encoder.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def test_every_copy_of_a_bank_is_jittered(images: Tensor) -> None:
    jitter = bank_augmentation(SCENARIOS["strong"])
    params = sample_photometric(jitter, 256, torch.Generator().manual_seed(0))
    identity = torch.tensor(IDENTITY)
    assert (params[:, :4] != identity[:4]).all()
    assert torch.equal(params[:, 4:], identity[4:].expand(256, -1))


def test_the_bank_is_the_runs_own_target_jitter_or_the_common_one() -> None:
    assert bank_augmentation(SCENARIOS["strong"]).strengths == (0.5, 0.5, 0.4, 0.2, 0.0, 0.0, 0.0)
    assert bank_augmentation(SCENARIOS["strong"], "default").strengths == (0.4, 0.4, 0.2, 0.1, 0.0, 0.0, 0.0)
    assert bank_augmentation(SCENARIOS["ijepa"]).jitter_probability == 1
    assert bank_augmentation(SCENARIOS["ijepa"]).strengths == (0.4, 0.4, 0.2, 0.1, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("scenario", ["ijepa", "nonsense"])
def test_a_scenario_without_jitter_is_refused_with_the_ones_there_are(scenario: str) -> None:
    with pytest.raises(ValueError, match=f"bank.scenario.*{scenario}.*strong_jitter"):
        bank_augmentation(VIEWS, scenario)


def test_a_bank_of_one_op_varies_nothing_else(images: Tensor) -> None:
    by_op = jitter_by_op(bank_augmentation(SCENARIOS["extended"]))
    assert list(by_op) == ["brightness", "contrast", "saturation", "hue", "gamma", "temperature"]
    params = sample_photometric(by_op["gamma"], 64, torch.Generator().manual_seed(0))
    changed = (params != torch.tensor(IDENTITY)).any(0)
    assert [name for name, some in zip(PHOTOMETRIC_FIELDS, changed.tolist(), strict=True) if some] == ["gamma"]
    by_hue = compute_ranks(Oracle(), images[:2], BankSettings(num_views=32), jitter=by_op["hue"])
    assert (1 / by_hue.actions).mean() > 0.95


def test_single_ops_have_a_table_of_their_own(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EvalContext, "first_images", lambda self, most, at_least: (images[:most], ["a", "b", "c"]))
    context = context_of(Oracle())
    settings = MRRSettings(Path(), bank=BankSettings(num_images=3, num_views=8), by_op=True)
    result = evaluate(context, settings, Path())
    whole, single = tables(result)
    assert [row[0] for row in single.rows] == list(result["by_op"]) == ["brightness", "contrast", "saturation", "hue"]
    assert len(single.columns) == 5
    assert whole.rows == tables(evaluate(context, replace(settings, by_op=False), Path()))[0].rows


def test_two_models_are_asked_the_same_questions(images: Tensor) -> None:
    seen: list[Tensor] = []
    model = Oracle()

    def predict(context: Tensor, action: Tensor) -> Tensor:
        seen.append(action)
        return context

    model.predict = predict
    compute_ranks(model, images[:2], BankSettings(num_views=8), seed=5)
    first = list(seen)
    seen.clear()
    compute_ranks(model, images[:2], BankSettings(num_views=8), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))
    assert not torch.equal(first[0], first[-1])

"""Composition: a model that adds composes and comes home, one that forgets its input does not; file, tables, page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dali_pipelines.views import SCENARIOS, Views
from iwm.config import Config
from iwm.evaluate import main
from iwm.evaluation.action_settings import CompositionSettings
from iwm.evaluation.bank import chance_mrr
from iwm.evaluation.composition import COMPOSITION, UNDOING, score_image
from iwm.evaluation.settings import BankSettings
from iwm.model_config import ActionConfig, LossConfig
from tests.evaluation.conftest import diverge, mistake, untrained
from tests.evaluation.oracles import VIEWS, Blind, Oracle, context_of

BRIGHTNESS = replace(VIEWS.target, contrast=0.0, saturation=0.0, hue=0.0)
SETTINGS = CompositionSettings(Path("unused"), bank=BankSettings(num_views=32), num_queries=32)
SMALL = ("--bank.num-images", "3", "--bank.num-views", "16", "--num-queries", "4", "--passes", "3")


class Adding(Oracle):
    """Brightness scales the pixels, so that each action adds a vector: its change times the clean image, known here."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        views = replace(VIEWS, source=BRIGHTNESS, target=BRIGHTNESS)
        self.config = Config(views=views, loss=LossConfig(normalize_targets=False))
        self.clean = self.encode(clean[None], "teacher")

    def predict(self, context: Tensor, action: Tensor) -> Tensor:
        return context + action[:, :1, None] * self.action_spec.scale[0] * self.clean


class Forgetful(Adding):
    """Each action is applied to the clean image, whatever the input is."""

    def predict(self, context: Tensor, action: Tensor) -> Tensor:
        return super().predict(self.clean.expand_as(context), action)


def _scores(model: Oracle, image: Tensor, settings: CompositionSettings = SETTINGS) -> dict[str, dict[str, Tensor]]:
    return score_image(context_of(model), image, settings, torch.Generator().manual_seed(0))


def test_a_model_that_adds_reaches_the_second_view_in_any_number_of_passes(smooth_images: Tensor) -> None:
    image = smooth_images[0]
    scores = _scores(Adding(image), image)
    composed = scores["composition"]
    torch.testing.assert_close(composed["two_passes"], composed["one_pass"], atol=1e-3, rtol=0)
    for row in ("one_pass", "two_passes", "reentered_view", "encoded_view"):
        assert (composed[row][0] > 0.9).all()  # views are rounded to grey levels, and two may be nearly equal
        assert (composed[row][1] < 0.05).all()
    assert scores["chain"].keys() == {"1", "2", "3", "4"}
    for row in scores["chain"].values():
        torch.testing.assert_close(row, composed["one_pass"], atol=1e-3, rtol=0)


def test_the_inverse_of_an_action_comes_home_exactly_where_actions_add(smooth_images: Tensor) -> None:
    image = smooth_images[1]
    undone = _scores(Adding(image), image)["undoing"]
    for row in ("two_passes", "null", "two_null"):
        torch.testing.assert_close(undone[row], torch.tensor([[1.0, 1.0], [0.0, 0.0]]).double(), atol=1e-5, rtol=0)
    assert (undone["first_pass"][0] < 0.6).all()
    torch.testing.assert_close(undone["first_pass"][1], torch.ones(2).double(), atol=0.05, rtol=0)


def test_controls_with_the_action_of_another_pair_are_at_chance(smooth_images: Tensor) -> None:
    scores = torch.stack([_control_scores(Adding(image), image) for image in smooth_images]).mean(0)
    chance = chance_mrr(SETTINGS.bank.num_views)
    assert (scores < 2 * chance).all()
    assert (scores > chance / 4).all()


def _control_scores(model: Oracle, image: Tensor) -> Tensor:
    scores = _scores(model, image)
    return torch.stack([scores[part]["other_action"][0] for part in ("composition", "undoing")])


def test_a_model_that_forgets_its_input_neither_composes_nor_comes_home(smooth_images: Tensor) -> None:
    image = smooth_images[2]
    scores = _scores(Forgetful(image), image)
    composed, undone = scores["composition"], scores["undoing"]
    assert (composed["one_pass"][0] > 0.9).all()
    for row in ("two_passes", "encoded_view"):
        assert (composed[row][0] < 0.4).all()
        assert (composed[row][1] > 0.5).all()
    assert (undone["two_passes"][0] < 0.6).all()
    assert (undone["null"][0] == 1).all()
    assert scores["chain"]["1"][0, 0] > scores["chain"]["2"][0, 0] > scores["chain"]["4"][0, 0]


def test_a_model_blind_to_the_action_is_where_it_began(smooth_images: Tensor) -> None:
    image = smooth_images[0]
    model = Blind()
    model.config = Adding(image).config
    scores = _scores(model, image)
    for row in ("two_passes", "one_pass", "first_pass", "null", "source"):
        torch.testing.assert_close(scores["composition"][row][1], torch.ones(2).double())
        assert torch.equal(scores["composition"][row][0], scores["composition"]["source"][0])
    # It comes home without having left, which the row of the first action alone shows.
    assert torch.equal(scores["undoing"]["two_passes"], scores["undoing"]["first_pass"])


def _evaluate(monkeypatch: pytest.MonkeyPatch, run: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", "composition", "--checkpoint", str(run), *SMALL, *arguments])
    main()
    result: dict[str, Any] = json.loads((run / "eval" / "composition.json").read_bytes())
    return result


@pytest.mark.parametrize("encoder", ["teacher", "student"])
def test_every_row_has_scores_in_file_tables_and_page(run: Path, monkeypatch: pytest.MonkeyPatch, encoder: str) -> None:
    result = _evaluate(monkeypatch, run, "--encoder", encoder)
    assert (result["images"], result["bank"], result["queries"], result["context"]) == (3, 16, 4, encoder)
    assert result["chance"] == pytest.approx(chance_mrr(16))
    assert result["chance_source"] == pytest.approx(chance_mrr(17))
    for part, rows in (("composition", COMPOSITION), ("undoing", UNDOING), ("chain", ("1", "2", "3"))):
        assert set(result[part]) == set(rows)
        for scores in result[part].values():
            assert scores.keys() == {"mrr", "relative_distance"}
            for distance in ("pooled", "per_token"):
                assert 0 < scores["mrr"][distance]["mean"] <= 1
                assert scores["relative_distance"][distance].keys() == {"mean", "standard_error"}
    assert result["chain"]["1"] == result["composition"]["one_pass"]
    assert result["composition"]["source"]["relative_distance"]["pooled"]["mean"] == pytest.approx(1)
    assert [len(table["rows"]) for table in result["tables"]] == [len(COMPOSITION), len(UNDOING), 3]
    page = (run / "report.html").read_text()
    assert "Composition: x to z over y" in page
    assert "untrained" not in result["tables"][0]["caption"]


def test_the_same_seed_gives_the_same_scores(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, same, other = (_evaluate(monkeypatch, run, "--seed", seed)["composition"] for seed in ("1", "1", "2"))
    assert one == same
    assert one != other


def test_what_a_run_cannot_know_is_said(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = replace(config, action=ActionConfig(conditioning="none"), views=replace(SCENARIOS["destructive"], size=32))
    result = _evaluate(monkeypatch, untrained(tmp_path / "run", blind))
    assert result["composition"]["two_passes"] == result["composition"]["other_action"]
    caption = result["tables"][0]["caption"]
    assert "by construction" in caption
    assert "sources were never jittered, so actions from y are untrained" in caption


@pytest.mark.parametrize("encoding", ["difference", "log_ratio"])
def test_destroyed_targets_and_logarithms_compose_too(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: Any
) -> None:
    views = replace(Views(size=32), target=Views().source)
    action = ActionConfig(conditioning="sequence", jitter_encoding=encoding)
    result = _evaluate(monkeypatch, untrained(tmp_path / "run", replace(config, views=views, action=action)))
    assert result["chain"]["3"]["mrr"]["pooled"]["mean"] > 0


def test_a_mistake_ends_with_one_line(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = replace(Views().target, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    run = untrained(tmp_path / "run", replace(config, views=replace(Views(size=32), target=still)))
    arguments = ("composition", "--checkpoint", str(run))
    assert "use --bank.scenario default" in mistake(monkeypatch, *arguments)
    many = mistake(monkeypatch, *arguments, "--num-queries", "80")
    assert "--num-queries 80: must be from 2 to --bank.num-views 64" in many
    diverge(run)
    assert "not finite" in mistake(monkeypatch, *arguments, *SMALL, "--bank.scenario", "default")
    assert not (run / "eval" / "composition.json").exists()

"""Undoing: a model that knows how scores near one where it is told and not otherwise; the bank is embedded once."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dali_pipelines.augmentations import IDENTITY, JITTER_OPS
from dali_pipelines.views import SCENARIOS, Views
from iwm.config import Config
from iwm.evaluate import main
from iwm.evaluation.bank import chance_mrr
from iwm.evaluation.corruptions import SCORE_NAMES, CorruptionScores, make_corruptions, score_corruptions
from iwm.evaluation.mrr import compute_ranks
from iwm.evaluation.settings import BankSettings, CorruptionSettings
from iwm.model_config import ActionConfig
from tests.evaluation.conftest import mistake, untrained
from tests.evaluation.oracles import VIEWS, Blind, Knowing, Oracle, context_of

SETTINGS = CorruptionSettings(checkpoint=Path("unused"), bank=BankSettings(num_views=64), num_queries=16)


def _undone(
    model: Oracle, image: Tensor, settings: CorruptionSettings = SETTINGS
) -> tuple[CorruptionScores, dict[str, dict[str, float]]]:
    """What came of every source, and the scores of each op's greatest strength by name; the clean source is ''."""
    wanted = make_corruptions(VIEWS, settings)
    context = context_of(model)
    undone = score_corruptions(context, image, wanted, settings, torch.Generator().manual_seed(0))
    names = ["", *(each.op for each in wanted)]
    by_name = {name: dict(zip(SCORE_NAMES, undone.scores[:, i].tolist(), strict=True)) for i, name in enumerate(names)}
    return undone, by_name


@pytest.mark.parametrize("op", ["grayscale", "blur", "solarize"])
def test_what_destroys_is_undone_by_a_model_that_is_told(op: str, smooth_images: Tensor) -> None:
    _, scores = _undone(Knowing(smooth_images[0]), smooth_images[0])
    assert scores[op]["with_action"] > 0.95
    assert scores[op]["restored"] == 1
    assert scores[op]["without_action"] < scores[op]["with_action"] - 0.15
    assert scores[op]["shuffled"] < 0.15


def test_a_jittered_source_is_turned_by_what_is_left_to_the_copy(smooth_images: Tensor) -> None:
    _, scores = _undone(Oracle(), smooth_images[1])
    assert scores["hue"]["with_action"] > 0.8
    assert scores["hue"]["without_action"] < scores["hue"]["with_action"] - 0.15
    assert scores["hue"]["restored"] > 0.4


def test_the_clean_source_is_told_nothing_to_undo_and_scores_as_mrr_does(smooth_images: Tensor) -> None:
    settings = replace(SETTINGS, num_queries=64)
    _, scores = _undone(Oracle(), smooth_images[2], settings)
    assert scores[""]["with_action"] == scores[""]["without_action"]
    ranks = compute_ranks(Oracle(), smooth_images[2:3], settings.bank).actions
    assert scores[""]["with_action"] == pytest.approx((1 / ranks[0, 0]).mean().item())


def test_a_model_blind_to_the_action_scores_chance_from_every_source(smooth_images: Tensor) -> None:
    _, scores = _undone(Blind(), smooth_images[3], replace(SETTINGS, num_queries=64))
    for score in scores.values():
        assert score["with_action"] == pytest.approx(chance_mrr(64), rel=0.05)
        assert score["with_action"] == score["without_action"]


def test_pictures_show_the_source_and_what_undoing_retrieves(smooth_images: Tensor) -> None:
    image = smooth_images[4]
    undone, _ = _undone(Knowing(image), image)
    assert torch.equal(undone.sources[0], image)
    assert torch.equal(undone.restored[1], image)
    grey = undone.sources[1]
    assert (grey == grey[..., :1]).all()


def test_the_bank_is_embedded_once_however_many_corruptions_there_are(smooth_images: Tensor) -> None:
    class Counting(Oracle):
        embedded = 0

        def target_features(self, images: Tensor) -> Tensor:
            self.embedded += len(images)
            return super().target_features(images)

    model = Counting()
    _undone(model, smooth_images[5])
    assert model.embedded == 64 + 1


def test_corruptions_go_both_ways_and_never_beyond_the_bank() -> None:
    made = make_corruptions(SCENARIOS["strong"], replace(SETTINGS, strengths=(1.0, 0.5)))
    hue = [each.params[3] for each in made if each.op == "hue"]
    assert hue == pytest.approx([-0.2, -0.1, 0.1, 0.2])
    assert [each.op for each in made[-2:]] == ["all jitter", "everything"]
    everything = made[-1].params
    assert everything[len(JITTER_OPS) :] == (1, 1, 1)
    assert not any(each.trained for each in make_corruptions(SCENARIOS["jitter"], SETTINGS) if each.op == "blur")
    still = make_corruptions(Views(target=replace(Views().target, hue=0.0)), SETTINGS)
    assert "hue" not in {each.op for each in still}
    assert all(len(each.params) == len(IDENTITY) for each in made)


@pytest.mark.parametrize(
    ("views", "action"),
    [
        (Views(size=32), ActionConfig(conditioning="none")),
        (replace(Views(size=32), target=Views().source), ActionConfig(conditioning="sequence")),
        (
            replace(SCENARIOS["destructive"], size=32, jitter_impl="torchvision"),
            ActionConfig(jitter_encoding="log_ratio"),
        ),
    ],
    ids=["no conditioning", "destroyed targets, sequence", "no jitter, torchvision colour"],
)
def test_every_kind_of_run_is_asked(
    views: Views,
    action: ActionConfig,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = untrained(tmp_path / "run", replace(config, views=views, action=action))
    arguments = (
        "--bank.num-images",
        "2",
        "--bank.num-views",
        "16",
        "--num-queries",
        "16",
        "--num-shown",
        "1",
        "--strengths",
        "1.0",
    )
    monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", "corruptions", "--checkpoint", str(run), *arguments])
    main()
    result = json.loads((run / "eval" / "corruptions.json").read_bytes())
    ops = {op["op"]: op for op in result["ops"]}
    assert [len(ops[op]["strengths"]) for op in ("grayscale", "blur", "hue", "everything")] == [1, 3, 2, 1]
    for op in ops.values():
        assert all(0 < op[score]["mean"] <= 1 for score in SCORE_NAMES)
    if action.conditioning == "none":
        assert ops["blur"]["with_action"] == ops["blur"]["without_action"]
        assert ops["blur"]["with_action"]["mean"] == pytest.approx(chance_mrr(16))
        assert "by construction" in " ".join(capsys.readouterr().out.split())
    blocks = result["figures"][0]["groups"][0]["blocks"]
    assert [block["title"].split(" ")[0] for block in blocks] == [op["op"].split(" ")[0] for op in result["ops"]]
    assert all(len(column["tiles"]) == len(block["rows"]) for block in blocks for column in block["columns"])
    assert "Undoing corruptions" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--num-queries", "17", "--bank.num-views", "16"), "--num-queries 17.*--bank.num-views 16"),
        (("--blur-sigmas", "0.0"), "--blur-sigmas"),
        (("--strengths", "1.5"), "--strengths"),
        (("--bank.num-views", "1"), "--bank"),
    ],
)
def test_a_mistake_ends_with_one_line(
    arguments: tuple[str, ...], says: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.search(says, mistake(monkeypatch, "corruptions", "--checkpoint", str(run), *arguments))
    assert not (run / "eval" / "corruptions.json").exists()

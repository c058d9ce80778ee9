"""Grids: what a perfect, a blind and a forgetful model retrieve along one parameter, for every kind of run."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dali_pipelines.views import SCENARIOS, Views
from iwm.config import Config
from iwm.evaluate import main
from iwm.evaluation.parameter_sweep import (
    SweepResult,
    change_in_words,
    correlation,
    make_sweeps,
    nearest_of_sweep,
    run_sweeps,
    summarise,
)
from iwm.evaluation.settings import SweepSettings
from iwm.model_config import ActionConfig
from tests.evaluation.conftest import mistake, untrained
from tests.evaluation.oracles import VIEWS, Blind, Knowing, Oracle, context_of

SETTINGS = SweepSettings(checkpoint=Path("unused"), num_values=7, num_sigmas=4)


def _asked(model: Oracle, image: Tensor) -> dict[str, tuple[SweepResult, SweepResult]]:
    """What was found in one image's series, told and in the control, by the series' names."""
    wanted = make_sweeps(VIEWS, model.action_spec.target_flags, SETTINGS)
    context = context_of(model)
    _, answers = run_sweeps(context, image, wanted, SETTINGS, torch.Generator().manual_seed(0))
    return {series.name: answer for series, answer in zip(wanted, answers, strict=True)}


def test_a_perfect_model_retrieves_each_value_in_order(smooth_images: Tensor) -> None:
    asked = _asked(Oracle(), smooth_images[0])
    for op in ("brightness", "contrast", "saturation", "hue"):
        told, control = asked[op]
        assert told.nearest.tolist() == list(range(7))
        assert told.hit.tolist() == [1] * 7
        assert correlation(range(7), told.retrieved) == pytest.approx(1)
        assert sorted(control.nearest.tolist()) == list(range(7))
        assert control.nearest.tolist() != list(range(7))


def test_what_is_undone_is_gone_when_told_and_still_there_when_not(smooth_images: Tensor) -> None:
    asked = _asked(Knowing(smooth_images[1]), smooth_images[1])
    for name, strengths in (("undo blur", 4), ("undo grayscale", 2), ("undo solarize", 2)):
        told, control = asked[name]
        assert told.nearest.tolist() == [0] * strengths
        assert control.nearest.tolist() == list(range(strengths))


def test_a_model_blind_to_the_action_orders_nothing(smooth_images: Tensor) -> None:
    wanted = make_sweeps(VIEWS, False, SETTINGS)[3]
    told, _ = _asked(Blind(), smooth_images[2])["hue"]
    assert wanted.name == "hue"
    scores = summarise(wanted, [told, told])
    assert scores["correlation"] == {"mean": 0, "standard_error": 0}
    assert scores["hits"]["mean"] == pytest.approx(1 / 7)


def test_views_that_cannot_be_told_apart_share_the_hit_and_give_the_mean_value() -> None:
    series = make_sweeps(VIEWS, False, SETTINGS)[0]
    same = nearest_of_sweep(torch.ones(7, 7), torch.ones(7), series)
    assert torch.allclose(same.retrieved, torch.ones(7).double())
    assert torch.allclose(same.hit, torch.full((7,), 1 / 7).double())


def test_a_broken_model_is_not_taken_for_one() -> None:
    series = make_sweeps(VIEWS, False, SETTINGS)[0]
    assert nearest_of_sweep(torch.full((7, 7), torch.nan), torch.ones(7), series).retrieved.isnan().all()


def test_targets_that_can_be_destroyed_have_series_of_their_own() -> None:
    strong = SCENARIOS["strong"]
    names = [series.name for series in make_sweeps(strong, False, SETTINGS)]
    assert names == ["brightness", "contrast", "saturation", "hue", "undo grayscale", "undo blur", "undo solarize"]
    destroyed = replace(strong, target=strong.source)
    names = [series.name for series in make_sweeps(destroyed, True, SETTINGS)]
    assert names[4:7] == ["grayscale", "blur", "solarize"]


def test_what_a_run_never_varied_is_marked_and_a_strength_of_nothing_left_out() -> None:
    still = make_sweeps(SCENARIOS["destructive"], False, SETTINGS)
    assert [series.trained for series in still] == [False] * 4 + [True] * 3
    views = Views(target=replace(Views().target, saturation=0.0), source=replace(Views().source, saturation=0.0))
    assert "saturation" not in [series.name for series in make_sweeps(views, False, SETTINGS)]


@pytest.mark.parametrize(("scenario", "added"), [("extended", ["gamma", "temperature"]), ("geometric", ["rotation"])])
def test_ops_beyond_the_paper_have_series_where_a_run_varies_them(scenario: str, added: list[str]) -> None:
    made = make_sweeps(SCENARIOS[scenario], False, SETTINGS)
    applied = [series.name for series in made if not series.undo]
    assert applied == ["brightness", "contrast", "saturation", "hue", *added]
    assert all(series.trained for series in made)
    words = {"gamma": "×1.40", "temperature": "+0.40 stops", "rotation": "+20°"}
    for series in made[4 : 4 + len(added)]:
        assert change_in_words(series.op, series.values[-1]) == words[series.op]


def test_the_range_is_the_runs_own_or_the_scenarios() -> None:
    own = make_sweeps(SCENARIOS["strong"], False, SETTINGS)[0]
    assert (own.values[0], own.values[-1]) == pytest.approx((0.5, 1.5))
    common = make_sweeps(SCENARIOS["strong"], False, replace(SETTINGS, scenario="default"))[0]
    assert (common.values[0], common.values[-1]) == pytest.approx((0.6, 1.4))


DESTROYED = replace(Views(size=32), target=Views().source)
FLAT = replace(Views().target, saturation=0.0)


@pytest.mark.parametrize(
    ("views", "action"),
    [
        (Views(size=32), ActionConfig(conditioning="none")),
        (DESTROYED, ActionConfig(conditioning="sequence")),
        (
            replace(SCENARIOS["destructive"], size=32, jitter_impl="torchvision"),
            ActionConfig(jitter_encoding="log_ratio"),
        ),
        (replace(Views(size=32), target=FLAT, source=FLAT), ActionConfig()),
    ],
    ids=["no conditioning", "destroyed targets, sequence", "no jitter, torchvision colour", "no saturation"],
)
def test_every_kind_of_run_gets_its_grids(
    views: Views,
    action: ActionConfig,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = untrained(tmp_path / "run", replace(config, views=views, action=action))
    arguments = ("--num-images", "3", "--num-values", "5", "--num-sigmas", "3", "--num-shown", "1")
    monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", "parameter-sweep", "--checkpoint", str(run), *arguments])
    main()
    result = json.loads((run / "eval" / "parameter-sweep.json").read_bytes())
    assert len(result["series"]) == {"sequence": 10}.get(action.conditioning, 7 - (views.target.saturation == 0))
    for series in result["series"]:
        assert len(series["with_action"]["retrieved"]) == len(series["target"]) == len(series["values"])
        assert -1 <= series["with_action"]["correlation"]["mean"] <= 1
    if action.conditioning == "none":
        assert {s["with_action"]["correlation"]["mean"] for s in result["series"] if not s["undo"]} == {0}
        assert "by construction" in " ".join(capsys.readouterr().out.split())
    blocks = result["figures"][0]["groups"][0]["blocks"]
    assert [block["title"] for block in blocks] == [series["name"] for series in result["series"]]
    assert [len(block["columns"]) for block in blocks] == [len(series["values"]) for series in result["series"]]
    assert "Parameter sweeps" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--num-values", "1"), "--num-values"),
        (("--scenario", "ijepa"), "--scenario: 'ijepa'.*strong_jitter"),
    ],
)
def test_a_mistake_ends_with_one_line(
    arguments: tuple[str, ...], says: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert re.search(says, mistake(monkeypatch, "parameter-sweep", "--checkpoint", str(run), *arguments))
    assert not (run / "eval" / "parameter-sweep.json").exists()

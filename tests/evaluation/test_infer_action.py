"""`iwm evaluate infer-action`: scores and baselines of a real run, and one line for what cannot be done."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dali_pipelines.views import SCENARIOS, Views
from iwm.config import Config
from iwm.evaluate import main
from iwm.evaluation.infer_action import tables
from iwm.evaluation.terminal_table import layout
from iwm.model_config import ActionConfig
from tests.evaluation.conftest import diverge, mistake, untrained

SMALL = (
    *("--num-images", "3", "--num-targets", "2", "--num-shown", "2"),
    *("--gradient.points", "6", "--gradient.starts", "1", "--gradient.steps", "2"),
    *("--cem.samples", "4", "--cem.elites", "2", "--cem.rounds", "2"),
    *("--regressor.num-images", "12", "--regressor.epochs", "2"),
)


def _evaluate(monkeypatch: pytest.MonkeyPatch, run: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", "infer-action", "--checkpoint", str(run), *SMALL, *arguments])
    main()
    result: dict[str, Any] = json.loads((run / "eval" / "infer-action.json").read_bytes())
    return result


def _with_shards(config: Config, shards: Path) -> Config:
    return replace(config, data=replace(config.data, shards=str(shards)))


def test_every_method_answers_every_pair_and_the_page_shows_them(
    config: Config,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = _with_shards(config, tiny_shards)
    run = untrained(tmp_path / "run", config)
    control = untrained(tmp_path / "control", replace(config, action=ActionConfig(shuffle=True)))
    result = _evaluate(monkeypatch, run, "--search", "gradient", "cem", "--control", str(control))
    assert list(result["kinds"]) == ["clean", "destructive"]
    methods = {"guess", "regressor", "lattice", "gradient", "cem", "control"}
    methods |= {f"{name}, student" for name in ("lattice", "gradient", "cem")}
    for kind, record in result["kinds"].items():
        assert record["methods"].keys() == methods
        assert record["searches"].keys() == methods - {"guess", "regressor"}
        assert len(record["values"]["image"]) == record["pairs"] == 6
        flags = ["source_grayscale", "source_blur", "source_solarize"] if kind == "destructive" else []
        assert list(record["values"]["entries"]) == ["brightness", "contrast", "saturation", "hue", *flags]
        for values in record["values"]["entries"].values():
            assert values.keys() == methods | {"true"}
            assert all(len(each) == 6 for each in values.values())
        for scores in record["methods"].values():
            assert list(scores["flags"]) == flags
            assert all(0 <= score["within_tenth"]["mean"] <= 1 for score in scores["parameters"].values())
        guess = record["methods"]["guess"]
        assert all(score["balanced_accuracy"]["mean"] == 0.5 for score in guess["flags"].values())
        true = record["values"]["entries"]["hue"]["true"]
        assert guess["parameters"]["hue"]["error"]["mean"] == pytest.approx(sum(map(abs, true)) / 6, abs=1e-2)
        found = record["searches"]
        assert found["gradient"]["found"]["mean"] <= found["lattice"]["found"]["mean"]
        assert found["gradient"]["predictions"] > 2
    assert result["left_out"] == {}
    blocks = [block for group in result["figures"][0]["groups"] for block in group["blocks"]]
    assert len(blocks) == 4
    assert all(len(block["columns"]) == 3 and block["notes"][1].startswith("inferred: ") for block in blocks)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Mean absolute error, clean source" in printed
    page = (run / "report.html").read_text()
    assert "<h2>Inferred actions</h2>" in page
    assert "Clean source: hue" in page
    assert "true change, turned by, degrees" in page


def test_the_same_seed_gives_the_same_answers_and_the_tables_of_one_search_fit_a_terminal(
    config: Config, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained(tmp_path / "run", _with_shards(config, tiny_shards))
    first = _evaluate(monkeypatch, run)
    again = _evaluate(monkeypatch, run)
    other = _evaluate(monkeypatch, run, "--seed", "1")
    methods, values = (
        [[record[part] for record in result["kinds"].values()] for result in (first, again, other)]
        for part in ("methods", "values")
    )
    assert methods[0] == methods[1] != methods[2]
    assert values[0] == values[1] != values[2]
    for table in tables(first):
        assert len(layout(table.columns, table.rows, 80).blocks) == 1, table.title


def test_without_a_training_split_the_regressor_is_left_out_and_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _evaluate(monkeypatch, run)
    assert "has no split 'train'" in result["left_out"]["regressor"]
    assert "left out: regressor: " in capsys.readouterr().out
    assert "regressor" not in result["kinds"]["clean"]["methods"]
    assert "Left out, regressor" in (run / "report.html").read_text()
    said = mistake(monkeypatch, "infer-action", "--checkpoint", str(run), *SMALL, "--regressor.split", "test")
    assert "no split 'test'" in said


@pytest.mark.parametrize(
    ("views", "action", "kinds"),
    [
        (SCENARIOS["jitter"], ActionConfig(conditioning="sequence", jitter_encoding="log_ratio"), ["clean"]),
        (SCENARIOS["destructive"], ActionConfig(), ["destructive"]),
        (Views(target=Views().source), ActionConfig(), ["clean", "destructive"]),
    ],
    ids=["jitter, ratios", "no jitter", "destroyed targets"],
)
def test_every_kind_of_run_is_asked_what_it_could_know(
    views: Views,
    action: ActionConfig,
    kinds: list[str],
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = untrained(tmp_path / "run", replace(config, views=replace(views, size=32), action=action))
    result = _evaluate(monkeypatch, run)
    assert list(result["kinds"]) == kinds
    for record in result["kinds"].values():
        scores = record["methods"]["gradient"]
        assert scores["parameters"] or scores["flags"]
        if "target_blur" in scores["flags"]:
            assert len(scores["flags"]) == 6
    assert "Inferred actions" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"action": ActionConfig(conditioning="none")}, "conditioning none.*use a run with"),
        ({"views": replace(SCENARIOS["ijepa"], size=32)}, "never differed.*use a run with"),
    ],
)
def test_a_run_without_actions_is_refused(
    change: dict[str, Any], says: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrained(tmp_path / "run", replace(config, **change))
    assert re.search(says, mistake(monkeypatch, "infer-action", "--checkpoint", str(run), *SMALL))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--cem.elites", "4"), "--cem.elites 4: must be less than --cem.samples 4"),
        (("--search", "gradient", "gradient"), "--search gradient gradient: name"),
        (("--num-targets", "1"), "--num-targets 1: must be at least 2"),
        (("--gradient.rate", "0"), "--gradient.rate"),
        (("--control", "/nowhere"), "/nowhere does not exist"),
    ],
)
def test_a_mistake_ends_with_one_line(
    arguments: tuple[str, ...], says: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert says in mistake(monkeypatch, "infer-action", "--checkpoint", str(run), *SMALL, *arguments)
    assert not (run / "eval" / "infer-action.json").exists()


def test_a_control_that_is_none_is_refused(
    run: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(control: Path) -> str:
        return mistake(monkeypatch, "infer-action", "--checkpoint", str(run), *SMALL, "--control", str(control))

    assert "was not trained with --action.shuffle" in refused(run)
    other = replace(config, action=ActionConfig(shuffle=True), views=replace(SCENARIOS["strong"], size=32))
    assert "was trained with other views" in refused(untrained(tmp_path / "other", other))


def test_a_model_that_diverged_is_an_error_and_writes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverge(run)
    assert "not finite" in mistake(monkeypatch, "infer-action", "--checkpoint", str(run), *SMALL)
    assert not (run / "eval" / "infer-action.json").exists()

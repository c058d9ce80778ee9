"""`python iwm/evaluate.py`: the files it promises, the same figures for the same seed, and one line for a mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iwm.evaluate import main
from tests.evaluation.conftest import diverge, mistake

SCRIPT = Path(__file__).parents[2] / "iwm" / "evaluate.py"
SMALL = ("--bank.num-images", "3", "--bank.num-views", "16")


def _evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["iwm/evaluate.py", *arguments])
    main()


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_bytes())
    return result


def test_mrr_writes_the_contracts_file_as_a_script(run: Path) -> None:
    command = [sys.executable, str(SCRIPT), "mrr", "--checkpoint", str(run), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Recall@1" in done.stdout
    result = _read(run / "eval" / "mrr.json")
    assert {"chance", "images", "bank", "mrr", "shuffled_actions", "recall"} <= result.keys()
    assert {"protocol", "checkpoint", "data", "settings", "seed", "versions", "seconds"} <= result.keys()
    for part in (result["mrr"], result["shuffled_actions"], result["recall"]["at_1"], result["recall"]["at_5"]):
        for distance in ("pooled", "per_token"):
            for context in ("teacher", "student"):
                score = part[distance][context]
                assert score.keys() == {"mean", "standard_error"}
                assert 0 <= score["mean"] <= 1
    assert (result["images"], result["bank"]) == (3, 16)
    assert result["chance"] == pytest.approx(sum(1 / i for i in range(1, 17)) / 16)
    assert result["checkpoint"].endswith("step-000000007.pt")
    assert result["data"]["split"] == "val"
    assert "reciprocal rank" in (run / "report.html").read_text()


def test_the_same_seed_gives_the_same_figures_and_another_one_others(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outputs = [tmp_path / f"{i}.json" for i in range(3)]
    for output, seed in zip(outputs, ("1", "1", "2"), strict=True):
        _evaluate(monkeypatch, "mrr", "--checkpoint", str(run), *SMALL, "--seed", seed, "--output", str(output))
    one, same, other = (_read(output)["mrr"] for output in outputs)
    assert one == same
    assert one != other
    assert not (run / "eval" / "mrr.json").exists()


def test_a_checkpoint_file_is_evaluated_into_its_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = next((run / "checkpoints").iterdir())
    _evaluate(monkeypatch, "mrr", "--checkpoint", str(file), *SMALL, "--bank.scenario", "strong")
    assert _read(run / "eval" / "mrr.json")["settings"]["bank"]["scenario"] == "strong"


def test_retrieval_stores_its_figures_and_puts_them_into_the_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _evaluate(monkeypatch, "retrieval", "--checkpoint", str(run), "--bank.num-images", "2", "--bank.num-views", "16")
    result = _read(run / "eval" / "retrieval.json")
    assert [len(row["actions"]) for row in result["photographs"]] == [3, 3]
    assert all(re.fullmatch(r"val-\d{5}", row["key"]) for row in result["photographs"])
    assert all(1 <= shown["rank"] <= 16 for row in result["photographs"] for shown in row["actions"])
    page = (run / "report.html").read_text()
    # The photograph and two views for each action: 3 random ones, then the best and the worst.
    assert page.count("data:image/webp;base64,") == 2 * (1 + 2 * 3) + 2 * (1 + 2 * 2)
    assert page.count('<img alt="photograph val-') == page.count("<img")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--bank.scenario", "ijepa"), r"--bank.scenario.*'ijepa'.*strong_jitter"),
        (("--bank.num-views", "1"), r"--bank.*at least 2"),
        (("--data.split", "test"), r"--data.split test: .* has no split 'test'; use one of \['val'\]"),
        (("--data.shards", "/nowhere"), r"/nowhere/manifest.json does not exist"),
    ],
)
def test_a_mistake_ends_with_one_line_that_names_the_remedy(
    run: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    assert re.search(says, mistake(monkeypatch, "mrr", "--checkpoint", str(run), *arguments))
    assert not (run / "eval" / "mrr.json").exists()


def test_a_run_that_is_not_there_or_has_no_checkpoint_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "nowhere" in mistake(monkeypatch, "mrr", "--checkpoint", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in mistake(monkeypatch, "mrr", "--checkpoint", str(tmp_path / "empty"))


def test_too_many_actions_for_the_bank_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("retrieval", "--checkpoint", str(run), "--num-actions", "17", "--bank.num-views", "16")
    assert "--num-actions 17" in mistake(monkeypatch, *arguments)


def test_a_model_that_diverged_is_an_error_and_writes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverge(run)
    assert "not finite" in mistake(monkeypatch, "mrr", "--checkpoint", str(run), *SMALL)
    assert not (run / "eval" / "mrr.json").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("mrr",), "--checkpoint"),
        (("mrr", "--checkpoint", "x", "--bank.colour", "red"), "--bank.colour"),
        (("world-model", "--checkpoint", "x", "--output", "one.json"), "--output"),
    ],
)
def test_a_wrong_command_line_is_refused_without_a_traceback(
    arguments: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        _evaluate(monkeypatch, *arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert named in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    "arguments", [("mrr", "--checkpoint", "x"), ("world-model", "--checkpoint", "x"), ("table", "--runs", "x")]
)
def test_torchrun_is_refused_where_one_process_evaluates(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in {**torchrun, "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    said = mistake(monkeypatch, *arguments)
    assert f"{arguments[0]} runs on one process, and torchrun has started 2; start it with python" in said
    assert "segmentation" in said


def test_help_names_every_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _evaluate(monkeypatch, "mrr", "--help")
    text = capsys.readouterr().out
    for option in ("--checkpoint", "--output", "--data.split", "--bank.num-images", "--bank.scenario", "--seed"):
        assert option in text

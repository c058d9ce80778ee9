"""The demo: stages from data to report, skipping of finished stages, and its summary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iwm.evaluation.registry import EVALUATORS
from tests.evaluation.printed import assert_whole
from tools.demo import DemoOptions, stages, summary

SCRIPT = Path(__file__).parents[2] / "tools" / "demo.py"
TINY = ("--steps", "12", "--control-steps", "6", "--tiles", "256", "128")


def test_an_evaluation_older_than_the_checkpoint_is_rerun(tmp_path: Path) -> None:
    options = DemoOptions(out=tmp_path / "run", data=tmp_path / "data")
    judge = next(stage for stage in stages(options) if "world-model" in stage.command)
    results = [tmp_path / "run" / "eval" / f"{name}.json" for name in EVALUATORS]
    assert judge.finished is not None
    assert not judge.finished()
    for path in (tmp_path / "run" / "checkpoints" / "step-000000005.pt", *results):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert judge.finished()
    os.utime(results[3], (0, 0))
    assert not judge.finished()


def test_the_summary_says_where_a_figure_is_not_as_expected(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    for name, own, step in (("mrr.json", 0.31, 2000), ("mrr-no-jitter.json", 0.2, 1000)):
        scores = {value: _scores(value) for value in (own, 0.022)}
        figures = {
            "checkpoint": f"run/checkpoints/step-{step:09d}.pt",
            "chance": 0.0239,
            "mrr": scores[own],
            "shuffled_actions": scores[0.022],
        }
        (tmp_path / "eval" / name).write_text(json.dumps(figures))
    table = summary(tmp_path)
    assert_whole(table)
    assert [row[-1] for row in table.rows[:3]] == ["yes", "yes", "NO"]
    names = [row[0] for row in table.rows]
    assert names[0] == "the world model, 2,000 steps"
    assert names[2] == "trained without jitter, 1,000 steps"


def _scores(value: float) -> dict[str, dict[str, dict[str, float]]]:
    return {distance: {"teacher": {"mean": value, "standard_error": 0.01}} for distance in ("pooled", "per_token")}


@pytest.mark.long
def test_the_whole_demo_small_and_again(tmp_path: Path) -> None:
    run, control = tmp_path / "demo", tmp_path / "demo-no-jitter"
    command = [sys.executable, str(SCRIPT), "--out", str(run), "--data", str(tmp_path / "data"), *TINY]
    subprocess.run(command, check=True)
    page = (run / "report.html").read_text()
    assert "mrr-no-jitter" in page
    assert "data:image/webp" in page
    assert "<script" in page
    assert json.loads((run / "eval" / "mrr-no-jitter.json").read_text())["checkpoint"].startswith(str(control))
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*") if path.suffix in (".pt", ".json", ".tar")}
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert again.stdout.count("finished before, skipped") == 5
    assert before == {path: path.stat().st_mtime for path in before}

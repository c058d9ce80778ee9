"""The demo runs from nothing to a report, keeps what is finished, and says plainly where it failed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from iwm.evaluate import PROTOCOLS
from tools.demo import DemoError, Options, Stage, run_stages, stages, summary

SCRIPT = Path(__file__).parents[2] / "tools" / "demo.py"
TINY = ("--steps", "12", "--control-steps", "6", "--tiles", "256", "128")


def _touch(path: Path) -> list[str]:
    return ["-c", f"open({str(path)!r}, 'w')"]


def test_finished_stages_are_kept_and_the_others_run_in_order(tmp_path: Path) -> None:
    files = [tmp_path / str(i) for i in range(3)]
    todo = [Stage(file.name, _touch(file), file.exists) for file in files]
    files[1].write_text("made before")
    run_stages(todo, Console(quiet=True))
    assert [file.read_text() for file in files] == ["", "made before", ""]
    assert files[0].stat().st_mtime_ns < files[2].stat().st_mtime_ns


def test_a_stage_that_fails_stops_the_demo_and_is_named(tmp_path: Path) -> None:
    after = tmp_path / "after"
    todo = [Stage("shards", ["-c", "raise SystemExit(3)"]), Stage("training", _touch(after))]
    with pytest.raises(DemoError, match=r"'shards' failed \(exit code 3"):
        run_stages(todo, Console(quiet=True))
    assert not after.exists()


def test_a_stage_that_saved_and_left_early_is_not_taken_for_finished(tmp_path: Path) -> None:
    after = tmp_path / "after"
    todo = [Stage("training", ["-c", "pass"], lambda: False), Stage("measuring", _touch(after))]
    with pytest.raises(DemoError, match=r"'training' was stopped before its end"):
        run_stages(todo, Console(quiet=True))
    assert not after.exists()


def test_a_demo_that_is_stopped_lets_its_stage_save_first(tmp_path: Path) -> None:
    started, saved = tmp_path / "started", tmp_path / "saved"
    stage = f"""
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(saved)!r}).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(started)!r}).touch()
time.sleep(60)
"""
    demo = f"from tools.demo import _run; import sys; _run([sys.executable, '-c', {stage!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", demo],
        cwd=SCRIPT.parents[1],
        stderr=subprocess.DEVNULL,
        # A background job inherits that Ctrl-C is ignored; a terminal's does not.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert saved.exists()


def test_an_evaluation_older_than_the_checkpoint_is_made_again(tmp_path: Path) -> None:
    options = Options(out=tmp_path / "run", data=tmp_path / "data")
    judge = next(stage for stage in stages(options) if "world-model" in stage.command)
    results = [tmp_path / "run" / "eval" / f"{name}.json" for name in PROTOCOLS]
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
    for name, own in (("mrr.json", 0.31), ("mrr-no-jitter.json", 0.2)):
        scores = {value: _scores(value) for value in (own, 0.022)}
        figures = {"chance": 0.0239, "mrr": scores[own], "shuffled_actions": scores[0.022]}
        (tmp_path / "eval" / name).write_text(json.dumps(figures))
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(summary(tmp_path))
    lines = [
        line.split() for line in console.export_text().splitlines() if "0.3" in line or "0.2" in line or "0.0" in line
    ]
    assert [line[-1] for line in lines[:3]] == ["yes", "yes", "NO"]


def _scores(value: float) -> dict[str, dict[str, dict[str, float]]]:
    return {distance: {"teacher": {"mean": value, "standard_error": 0.01}} for distance in ("pooled", "per_token")}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_whole_demo_small_and_again(tmp_path: Path) -> None:
    run, control = tmp_path / "demo", tmp_path / "demo-no-jitter"
    command = [sys.executable, str(SCRIPT), "--out", str(run), "--data", str(tmp_path / "data"), *TINY]
    subprocess.run(command, check=True)
    page = (run / "report.html").read_text()
    assert "mrr-no-jitter" in page
    assert "data:image/png" in page
    assert "<script" in page
    assert json.loads((run / "eval" / "mrr-no-jitter.json").read_text())["checkpoint"].startswith(str(control))
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*") if path.suffix in (".pt", ".json", ".tar")}
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert again.stdout.count("done before, kept") == 5
    assert before == {path: path.stat().st_mtime for path in before}

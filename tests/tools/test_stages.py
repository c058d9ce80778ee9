"""Stages: finished ones are skipped, failures are named, interrupted commands save first."""

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from stages import Stage, StageError, run_stages

TOOLS = Path(__file__).parents[2] / "tools"


def _touch(path: Path) -> list[str]:
    return ["-c", f"open({str(path)!r}, 'w')"]


def test_finished_stages_are_kept_and_the_others_run_in_order(tmp_path: Path) -> None:
    files = [tmp_path / str(i) for i in range(3)]
    todo = [Stage(file.name, _touch(file), file.exists) for file in files]
    files[1].write_text("made before")
    run_stages(todo, Console(quiet=True))
    assert [file.read_text() for file in files] == ["", "made before", ""]
    assert files[0].stat().st_mtime_ns < files[2].stat().st_mtime_ns


def test_a_stage_that_fails_stops_the_rest_and_is_named(tmp_path: Path) -> None:
    after = tmp_path / "after"
    todo = [Stage("shards", ["-c", "raise SystemExit(3)"]), Stage("training", _touch(after))]
    with pytest.raises(StageError, match=r"'shards' failed \(exit code 3"):
        run_stages(todo, Console(quiet=True))
    assert not after.exists()


def test_a_stage_that_saved_and_left_early_is_not_taken_for_finished(tmp_path: Path) -> None:
    after = tmp_path / "after"
    todo = [Stage("training", ["-c", "pass"], lambda: False), Stage("measuring", _touch(after))]
    with pytest.raises(StageError, match=r"'training' was stopped before its end"):
        run_stages(todo, Console(quiet=True))
    assert not after.exists()


def test_a_tool_that_is_stopped_lets_its_stage_save_first(tmp_path: Path) -> None:
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
    demo = f"from stages import run_child; import sys; run_child([sys.executable, '-c', {stage!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", demo],
        cwd=TOOLS,
        stderr=subprocess.DEVNULL,
        # A background job inherits an ignored SIGINT; a job in a terminal does not.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=600) != 0
    assert saved.exists()

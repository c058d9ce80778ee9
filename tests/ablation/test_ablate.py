"""`python iwm/ablate.py`: trains and scores every arm and seed, keeps what is done, goes on where it was cut."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iwm.ablate import main
from iwm.ablation.studies import STUDIES
from iwm.training.checkpoint import checkpoint_path, list_checkpoints
from shards.errors import UserError
from tests.ablation.widths import widths
from tests.training.runs import TINY, wait_until

SCRIPT = Path(__file__).with_name("widths.py")


def test_runs_that_failed_were_stopped_or_are_asked_for_alone_make_one_study(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tiny = [word for key, value in TINY.items() if key != "predictor.embed_dim" for word in (f"--{key}", str(value))]
    own = ["--jobs", "2", "--bank.num-images", "3", "--bank.num-views", "8", "--out", "out"]
    training = ["--data.shards", str(tiny_shards), "--schedule.steps", "200", "--log.no-tensorboard", *tiny]
    narrow, wide = (out / f"default-{column}-seed0" for column in ("narrow", "wide"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDIES, "widths", widths)

    def arguments(*options: str) -> list[str]:
        return ["widths", "demo", *own, *options, "--", *training]

    def ablate(*options: str) -> str:
        main(arguments(*options))
        return capsys.readouterr().out

    with pytest.raises(UserError, match=r"--only 3: the study has 2 runs; --list-runs"):
        ablate("--only", "3")

    # One of two runs at once fails: the other is finished.
    (wide / "eval").mkdir(parents=True)
    (wide / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        ablate()
    said = capsys.readouterr().out
    assert re.search(r"default-wide-seed0: iwm/train.py failed.*default-wide-seed0/log.txt", said)
    assert [result["column"] for result in _read(out / "ablation.json")["results"]] == ["narrow"]
    assert "not run" in (out / "tables.md").read_text()
    assert "1 default-narrow-seed0: finished\n2 default-wide-seed0\n" in ablate("--list-runs")
    (wide / "checkpoints").unlink()

    # The study is stopped while the other run trains.
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), *arguments()]
    stopped = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_until(lambda: bool(list(wide.glob("checkpoints/*.pt"))), stopped)
    stopped.send_signal(signal.SIGTERM)
    assert "stopped; rerun the same command to resume" in stopped.communicate(timeout=600)[1]
    assert stopped.returncode == 1
    assert list_checkpoints(wide)[0] != checkpoint_path(wide, 200)

    before = {path: path.stat().st_mtime_ns for path in narrow.rglob("*.pt")}
    said = ablate()
    assert "default-narrow-seed0: already finished, skipped" in said
    assert "default-wide-seed0: trained in" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}

    # One run alone, as a job of an array, leaves the study's tables to a later command.
    shutil.rmtree(narrow)
    (out / "ablation.json").unlink()
    assert "default-narrow-seed0: trained in" in ablate("--only", "1")
    assert not (out / "ablation.json").exists()
    assert "1 default-narrow-seed0: finished\n2 default-wide-seed0: finished\n" in ablate("--list-runs")

    assert ablate().count("already finished, skipped") == 2
    results = _read(out / "ablation.json")["results"]
    assert [(result["column"], result["seed"]) for result in results] == [("narrow", 0), ("wide", 0)]
    assert {result["evaluations"]["mrr-default"]["checkpoint"][-12:] for result in results} == {"000000200.pt"}
    tables = (out / "tables.md").read_text()
    assert re.search(r"\| default \| \d\.\d{3}, paper 0.50 \| \d\.\d{3} \|", tables)
    page = (out / "report.html").read_text()
    assert all(run.name in page for run in (narrow, wide))
    assert "paper 0.50" in page


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_bytes())
    return result


def test_the_banks_scenario_is_the_studys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["iwm/ablate.py", "conditioning", "demo", "--bank.scenario", "strong"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "--bank.scenario" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["depth", "demo"], r"'depth' is not a study.*complexity"),
        (["conditioning", "demos"], r"'demos' is not a recipe.*cpu_small"),
        (["conditioning", "demo", "--jobs", "0"], "--jobs"),
        (["conditioning", "demo", "--common", "destructive"], "--common: 'destructive' is not a scenario with jitter"),
        (["conditioning", "demo", "--", "--predictor.embed-dim", "97"], "predictor.embed_dim 97"),
    ],
)
def test_a_mistake_ends_with_one_line_before_anything_is_trained(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["iwm/ablate.py", *arguments])
    with pytest.raises(UserError) as stop:
        main()
    assert re.search(says, str(stop.value))
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.iterdir())

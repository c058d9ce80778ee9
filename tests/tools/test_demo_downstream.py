"""The downstream demo: every stage is a valid command, and the summary marks results below expectation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iwm.downstream.registry import PROTOCOLS
from iwm.evaluate import parse
from tests.evaluation.printed import assert_whole
from tools.demo_downstream import DOWNSTREAM_STAGES, DownstreamOptions, stages, summary

ROOT = Path(__file__).parents[2]


def test_every_protocol_that_trains_is_run_by_a_valid_command() -> None:
    assert {trial.protocol for trial in DOWNSTREAM_STAGES} == set(PROTOCOLS)
    for stage in stages(DownstreamOptions(steps=3)):
        name, settings = parse(stage.command[1:])
        assert name == stage.command[1]
        if name in PROTOCOLS:
            assert settings.steps == 3


def test_the_summary_says_where_a_figure_is_below_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    for trial in DOWNSTREAM_STAGES:
        reached = 0.1 if trial.protocol == "attentive" else 0.9
        (tmp_path / "eval" / f"{trial.protocol}.json").write_text(json.dumps(_result(trial.protocol, reached)))
    table = summary(tmp_path)
    assert_whole(table)
    reached = {row[0]: row[-1] for row in table.rows}
    assert reached["attentive"] == "NO"
    assert [row[-1] for row in table.rows].count("yes") == len(table.rows) - 1 == 9


def _result(protocol: str, reached: float) -> dict[str, Any]:
    top1 = {"mean": reached}
    trial: dict[str, Any] = {
        "top1": top1,
        "miou": top1,
        "best": {"score": reached},
        "scores": {task: {"top1": top1} for task in ("colour", "place")},
    }
    trials = {
        kind: {**trial, "predictor": kind, "part": part}
        for kind, part in (("pretrained", "predictor"), ("random", "encoder"))
    }
    tasks = {task: {"chance": 0.2} for task in ("colour", "place")}
    return {
        "protocol": protocol,
        "trials": {**trials, "multitask": trial},
        "tasks": tasks,
        "chance": 0.2,
        "chosen": "pretrained",
        "classes": 7,
    } | ({} if protocol == "multitask" else {"trials": trials})


@pytest.mark.long
def test_the_whole_downstream_demo_small_and_again(tmp_path: Path) -> None:
    run, data = tmp_path / "demo", tmp_path / "data"
    tiny = ["--out", str(run), "--data", str(data), "--steps", "12", "--tiles", "256", "128", "--until-trained"]
    subprocess.run([sys.executable, str(ROOT / "tools" / "demo.py"), *tiny], check=True)
    command = [sys.executable, str(ROOT / "tools" / "demo_downstream.py"), "--run", str(run), "--steps", "3"]
    subprocess.run(command, check=True)
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert again.stdout.count("finished before, skipped") == len(DOWNSTREAM_STAGES) + 1

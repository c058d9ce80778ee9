"""RUN/run.json says where and how a run was trained, over stops, kills and resumes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from iwm.training.checkpoint import load_world_model, versions
from iwm.training.run_record import RECORD, RunRecord, RunRecordError, read_record, source_commit
from shards.format import load_manifest
from tests.training.runs import tiny_config, train_here


def _record(run: Path, step: int) -> RunRecord:
    parameters = {"encoder": 7, "predictor": 3}
    return RunRecord(run, step=step, device=torch.device("cpu"), processes=2, images=100, parameters=parameters)


def _segments(run: Path) -> list[tuple[int, int]]:
    record = read_record(run)
    assert record is not None
    return [(part["first_step"], part["last_step"]) for part in record["segments"]]


def test_a_run_records_its_images_its_model_and_its_machine(tiny_shards: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_shards, 10)
    train_here(config, tmp_path)
    record = read_record(tmp_path)
    assert record is not None
    assert record["images"] == load_manifest(tiny_shards, "train").samples
    model, _ = load_world_model(tmp_path)
    assert record["parameters"]["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    [segment] = record["segments"]
    assert (segment["first_step"], segment["last_step"], segment["processes"]) == (0, 10, 1)
    assert segment["seconds"] > 0
    assert segment["device"].startswith("cpu")
    assert segment["versions"] == versions()
    # A finished run that is started again trains nothing and records nothing.
    train_here(config, tmp_path)
    assert read_record(tmp_path) == record


def test_every_start_has_a_segment_and_repeated_steps_count_once(tmp_path: Path) -> None:
    _record(tmp_path, 0).update(30)  # stopped
    _record(tmp_path, 30).update(50)  # killed after the checkpoint of step 40
    _record(tmp_path, 40)
    assert _segments(tmp_path) == [(0, 30), (30, 40), (40, 40)]


def test_a_start_that_took_no_step_to_a_checkpoint_leaves_no_segment(tmp_path: Path) -> None:
    _record(tmp_path, 0)
    _record(tmp_path, 0).update(10)
    assert _segments(tmp_path) == [(0, 10)]


def test_a_run_of_an_older_version_has_no_record_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    for content in ("{", json.dumps({"images": 5, "parameters": {}, "segments": [{"started": "today"}]})):
        (tmp_path / RECORD).write_text(content)
        with pytest.raises(RunRecordError, match=r"run\.json is not a record of a run .*; delete it"):
            read_record(tmp_path)


def test_the_commit_is_that_of_the_checkout_and_says_whether_it_was_modified(tmp_path: Path) -> None:
    assert source_commit(tmp_path) is None
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert source_commit(tmp_path) is None
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert source_commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("2")
    assert source_commit(tmp_path) == f"{commit}, modified"

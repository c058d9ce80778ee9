"""The pause for a checkpoint, measured by one process and by two that share the state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_pause import Turn, summarised

from tests.training.runs import ENVIRONMENT, ROOT

SMALL = ["--recipe", "demo", "--encoder.depth", "1", "--predictor.depth", "1", "--data.global-batch-size", "4"]
FAST = ["--train.no-compile", "--train.device", "cpu", "--data.num-threads", "1", "--saves", "1", "--steps", "1"]


def test_two_processes_measure_a_sharded_state(tiny_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "pause.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--shards", str(tiny_shards), "--folder", str(tmp_path), "--json", str(file), "--train.parallel", "fsdp"]
    done = subprocess.run(
        [sys.executable, *launcher, "benchmarks/checkpoint_pause.py", *SMALL, *FAST, *options],
        cwd=ROOT, capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pause for a checkpoint") == 1, "only the first process prints"
    result = json.loads(file.read_text())
    assert (result["processes"], result["parallel"], len(result["host_gib"])) == (2, "fsdp", 2)
    assert 0 < result["collect_ms"]["median"] < result["pause_ms"]["median"]
    assert result["write_ms"]["median"] > 0
    assert sum(result["copy_bytes"]) == pytest.approx(result["file_bytes"], rel=0.2), "each byte is copied once"
    assert result["copy_bytes"][0] == pytest.approx(result["copy_bytes"][1], rel=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["pause.json"]


def test_training_waits_for_the_slowest_process() -> None:
    one = Turn(step=1.0, pause=0.1, collect=0.01, step_beside=1.1, write=3.0, host_gib=2.0)
    result = summarised([[one, one], [one._replace(pause=0.5, host_gib=1.0), one._replace(pause=0.2)]])
    assert (result["pause_in_steps"]["lowest"], result["pause_in_steps"]["highest"]) == (0.2, 0.5)
    assert result["write_in_steps"]["median"] == 3.0
    assert result["host_gib"] == [2.0, 1.5]

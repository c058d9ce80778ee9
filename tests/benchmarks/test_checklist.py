"""The checklist of a new machine: its checks run, failures are told and stop nothing, nothing is lost on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checklist import checks, make

ROOT = Path(__file__).parents[2]


def checklist(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/checklist.py", *words]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=1500)


def test_parity_is_checked_and_written(tmp_path: Path) -> None:
    done = checklist(str(tmp_path / "out"), "--tiny", "--only", "parity")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "checklist.json").read_text())
    assert report["checks"]["parity"]["ended"] == "passed"
    assert report["machine"]["commit"]
    rows = json.loads((tmp_path / "out" / "parity.json").read_text())["rows"]
    assert {row["colour"] for row in rows} == {"linear", "torchvision"}
    assert all(row["replay"]["mean"] < 1 for row in rows)
    assert (tmp_path / "out" / "parity.log").read_text().startswith("python benchmarks/parity.py")


def test_a_check_that_fails_or_takes_too_long_says_so(tmp_path: Path) -> None:
    assert make(["-c", "raise SystemExit(3)"], tmp_path / "log", 1) == "FAILED with code 3"
    assert make(["-c", "import time; time.sleep(60)"], tmp_path / "log", 0.01) == "stopped after 0.01 minutes"


def test_a_check_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    done = checklist(str(tmp_path / "out"), "--only", "warp")
    assert done.returncode == 1
    assert done.stderr.startswith("benchmarks/checklist.py: --only warp: there are train, parity")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_checks_pass_in_the_small(tmp_path: Path) -> None:
    done = checklist(str(tmp_path / "out"), "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads((tmp_path / "out" / "checklist.json").read_text())["checks"]) == set(checks(tmp_path, True))

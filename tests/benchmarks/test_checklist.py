"""Checklist of a new machine: it resumes, failures do not stop it, and no process is left running."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import check_runs
import pytest
from checklist import NOT_ALL, ChecklistOptions, main, run
from checks import DOWNSTREAM, GROUPS, Check, checks, in_order, select_checks
from environment import BenchmarkError
from rich.console import Console

from iwm.downstream.registry import PROTOCOLS
from shards.command_line import run_command

ROOT = Path(__file__).parents[2]
HANG = 240
"""Time after which a command counts as hanging (seconds)."""


@pytest.fixture(autouse=True)
def compiled_kernels_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_runs, "kernel_cache_dir", lambda out: tmp_path / "kernels")


def make(out: Path, all_checks: dict[str, Check], said: Console | None = None, **options: object) -> int:
    return run(ChecklistOptions(out, **options), all_checks, said or Console(quiet=True))


def endings(out: Path) -> dict[str, str]:
    found = json.loads((out / "checklist.json").read_text())["checks"]
    return {name: outcome["ended"] for name, outcome in found.items()}


def counting(file: Path, then: str = "") -> Check:
    """Return a check that appends a line to a file and then runs other code."""
    return Check(["-c", f"open({str(file)!r}, 'a').write('made\\n')\n{then}"])


def count(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_what_failed_is_made_again_and_what_passed_is_not(tmp_path: Path) -> None:
    out, good, other = tmp_path / "out", tmp_path / "good", tmp_path / "other"
    mended = tmp_path / "mended"
    bad = f"import os\nif not os.path.exists({str(mended)!r}): raise SystemExit(3)"
    all_checks = {
        "good": counting(good),
        "bad": counting(tmp_path / "bad", bad),
        "other": counting(other),
        "later": counting(tmp_path / "later")._replace(needs="bad"),
    }
    assert make(out, all_checks) == 1
    assert endings(out) == {
        "good": "passed",
        "bad": "FAILED with code 3",
        "other": "passed",
        "later": "not run: it needs bad, which has not passed",
    }
    mended.touch()
    said = Console(record=True, width=200, file=io.StringIO())
    assert make(out, all_checks, said) == 0
    assert [count(tmp_path / name) for name in all_checks] == [1, 2, 1, 1]
    assert "good: passed before" in said.export_text()
    assert make(out, all_checks, only=("other",), fresh=True) == 0
    assert [count(tmp_path / name) for name in all_checks] == [1, 2, 2, 1]
    assert make(out, all_checks, only=("bad",), fresh=True) == 0
    assert set(endings(out)) == {"good", "bad", "other"}, "what needs a check that is repeated is forgotten"


def test_an_unfinished_try_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    made = tmp_path / "folder"
    once = Check(["-c", f"import os\nos.mkdir({str(made)!r})\nraise SystemExit(3)"], makes=(made,))
    assert make(tmp_path / "out", {"one": once}) == 1
    again = Check(["-c", f"import os\nos.mkdir({str(made)!r})"], makes=(made,))
    assert make(tmp_path / "out", {"one": again}) == 0
    made.rmdir()
    assert make(tmp_path / "out", {"one": again}) == 0
    assert made.exists(), "a check whose files are gone is made again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_cut_off_takes_children_and_grandchildren_along(number: signal.Signals, tmp_path: Path) -> None:
    out, pids = tmp_path / "out", tmp_path / "pids"
    # A grandchild in its own session, which ignores SIGTERM.
    deep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    deep += "; print('there', flush=True); time.sleep(600)"
    child = f"""
import os, subprocess, sys, time
if os.path.exists({str(pids)!r}): raise SystemExit(0)
deep = subprocess.Popen([sys.executable, "-c", {deep!r}], start_new_session=True, stdout=subprocess.PIPE)
deep.stdout.readline()
open({str(pids)!r} + ".new", "w").write(f"{{os.getpid()}} {{deep.pid}}")
os.rename({str(pids)!r} + ".new", {str(pids)!r})
time.sleep(600)
"""
    all_checks = {"first": Check(["-c", ""]), "deep": Check(["-c", child])}
    driver = f"""
from pathlib import Path
from rich.console import Console
from checklist import ChecklistOptions, run
from checks import Check
raise SystemExit(run(ChecklistOptions(Path({str(out)!r})), {all_checks!r}, Console()))
"""
    path = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    wait_until(lambda: pids.exists() or process.poll() is not None)
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(alive(pid) for pid in started)
    assert endings(out)["deep"] == "running"
    process.send_signal(number)
    code = process.wait(HANG)
    wait_until(lambda: not any(alive(pid) for pid in started))
    if number != signal.SIGKILL:
        assert code == 128 + number
        assert endings(out)["deep"] == f"stopped by {number.name}"
    assert make(out, all_checks) == 0
    assert endings(out) == {"first": "passed", "deep": "passed"}


def test_time_that_is_over_ends_a_check_and_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    all_checks = {"slow": Check(["-c", "import time; time.sleep(600)"]), "quick": Check(["-c", ""])}
    assert make(out, all_checks, minutes=0.01) == 1
    assert endings(out) == {"slow": "stopped after 0.01 minutes", "quick": "passed"}
    assert make(out, all_checks, total_minutes=0.01, fresh=True) == NOT_ALL
    assert endings(out)["slow"].endswith("minutes: time limit --total-minutes reached")
    assert "quick" not in endings(out)
    assert make(out, all_checks, only=("quick",), total_minutes=0.0) == NOT_ALL
    assert make(out, all_checks, only=("quick",)) == 0


def test_results_of_another_configuration_are_refused(tmp_path: Path) -> None:
    all_checks = {"one": counting(tmp_path / "one")}
    assert make(tmp_path, all_checks, tiny=True) == 0
    with pytest.raises(
        BenchmarkError, match=r"checklist\.json: .* tiny was True, is False; choose another OUT, or .*--fresh"
    ):
        make(tmp_path, all_checks)
    assert make(tmp_path, all_checks, fresh=True) == 0
    assert count(tmp_path / "one") == 2


def test_the_callers_path_is_kept_behind_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/some/packages")
    assert make(tmp_path, {"path": Check(["-c", "import os; print(os.environ['PYTHONPATH'])"])}) == 0
    assert (tmp_path / "path.log").read_text().splitlines()[-1] == f"{ROOT}{os.pathsep}/some/packages"


def test_kernels_that_a_cut_off_check_was_compiling_are_removed(tmp_path: Path) -> None:
    whole, half = tmp_path / "old" / "whole.so", tmp_path / "new" / "half.so"
    for file in (whole, half):
        file.parent.mkdir()
        file.touch()
    os.utime(whole, (1000, 1000))
    check_runs.clear_since(tmp_path, 2000)
    assert whole.exists()
    assert not half.exists()


def test_the_attention_kernel_of_the_training_is_recorded(tmp_path: Path) -> None:
    says = Check(["-c", "print('2 images'); print('bf16, attention: flash (packed)')"])
    assert make(tmp_path, {"train": says}) == 0
    found = json.loads((tmp_path / "checklist.json").read_text())["checks"]["train"]
    assert found["attention"] == "bf16, attention: flash (packed)"
    assert make(tmp_path, {"train": Check(["-c", "print('step 1')"])}, fresh=True) == 0
    assert json.loads((tmp_path / "checklist.json").read_text())["checks"]["train"]["attention"] is None


def test_groups_hold_every_check_once_and_a_check_comes_after_the_one_it_needs(tmp_path: Path) -> None:
    assert set(DOWNSTREAM) == set(PROTOCOLS)
    for tiny in (True, False):
        all_checks = checks(tmp_path, tiny)
        assert list(all_checks) == [name for group in GROUPS.values() for name in group]
        assert in_order(select_checks((), all_checks), all_checks) == list(all_checks)
        assert in_order(select_checks(("linear", "2"), all_checks), all_checks) == [
            "data",
            "train",
            "linear",
            "step",
            "all",
        ]


def test_a_check_that_is_not_there_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["checklist.py", str(tmp_path / "out"), "--only", "warp"])
    assert run_command(main, "benchmarks/checklist.py") == 1
    assert capsys.readouterr().err.startswith(
        "benchmarks/checklist.py: --only warp: does not exist; choose from data, train"
    )


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_all_checks_pass_in_the_small(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/checklist.py", str(tmp_path / "out"), "--tiny"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(endings(tmp_path / "out")) == set(checks(tmp_path, True))

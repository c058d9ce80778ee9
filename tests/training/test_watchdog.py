"""No process of a run outlives its launcher or waits for one that is gone; the one that others wait for is named."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kill_job import KillJob

from iwm.training import checkpoint as checkpoints
from tests.training.runs import ENVIRONMENT, ROOT, TINY, arguments, metrics

HANG = 60.0
"""Time (seconds) in which all processes must have ended; the machine may be busy."""

RANKS = Path(__file__).parent / "waiting_ranks.py"
Start = Callable[..., "WatchedJob"]


class WatchedJob:
    """Job with its output in a file."""

    def __init__(self, folder: Path, words: list[str], workers: int, **more: Path) -> None:
        self.output = folder / "log.txt"
        with open(self.output, "a") as file:
            self.job = KillJob(words, 1, workers, file, **more)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.job.processes(), self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)

    def all_end(self) -> str:
        """Return the output once no process is left."""
        assert self.job.seconds_until_gone(HANG) is not None, self.output.read_text()
        return self.output.read_text()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    started: list[WatchedJob] = []

    def job(words: list[str], workers: int, **more: Path) -> WatchedJob:
        started.append(WatchedJob(tmp_path, words, workers, **more))
        return started[-1]

    yield job
    for one in started:
        one.job.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_run_whose_launcher_is_gone_saves_and_ends(
    start: Start, tiny_shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    watched = start(arguments(tiny_shards, run, 1_000_000, "--data.val", "None", "--log.interval", "1"), 1)
    watched.wait_until(
        lambda: (run / "metrics.jsonl").exists() and '"step": 12,' in (run / "metrics.jsonl").read_text()
    )
    watched.job.agents[0].send_signal(number)
    output = watched.all_end()
    stopped = re.search(r"stopped by a signal after step ([\d,]+)", output)
    assert stopped, output
    saved = checkpoints.load_newest(run)
    assert saved is not None
    assert saved.step == int(stopped[1].replace(",", ""))
    assert "iwm/train.py: the launcher (torchrun, srun) of a process of this run is gone" in output
    assert "Traceback" not in output


def test_a_killed_process_is_named_in_one_line_and_the_others_end(start: Start, tmp_path: Path) -> None:
    watched = ranks(start, tmp_path)
    os.kill(watched.job.workers(0)[1], signal.SIGKILL)
    lines = watched.all_end().splitlines()
    (line,) = (line for line in lines if line.startswith("waiting_ranks.py: "))
    assert re.search(r"rank 1 on host \S+ \(.*after step [\d,]+\) was lost: .*rerun the same command to resume", line)


def test_a_stopped_process_is_named_before_the_collective_fails(start: Start, tmp_path: Path) -> None:
    watched = ranks(start, tmp_path)
    stopped = watched.job.workers(0)[1]
    os.kill(stopped, signal.SIGSTOP)
    watched.wait_until(lambda: "iwm: " in watched.output.read_text())
    os.kill(stopped, signal.SIGCONT)
    assert re.search(r"iwm: rank 1 on host \S+ \(.*after step [\d,]+\) was lost", watched.all_end())


def test_a_process_whose_data_hang_is_named_with_its_step(start: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data")
    watched = ranks(start, tmp_path, 1)
    named = r"iwm: rank 1 on host \S+ \(waiting for data, after step 4\) stopped answering: the other ranks wait for it"
    assert re.search(named, watched.all_end())


def ranks(start: Start, folder: Path, *hanging: int) -> WatchedJob:
    """Start two processes of waiting_ranks.py and wait until they take steps."""
    watched = start([str(folder), *map(str, hanging)], 2, script=RANKS)
    # Heartbeats are a second old at most; one of these steps is then among them.
    count, file = 4 if hanging else 60, folder / "steps"
    watched.wait_until(lambda: file.exists() and int(file.read_text() or 0) >= count)
    return watched


def test_a_process_ends_with_the_program_that_its_environment_names(tmp_path: Path) -> None:
    """Without a launcher a training outlives its parent; with IWM_WATCHED_PID it ends with that process."""
    program = "import time; from iwm.training.watchdog import Watchdog\nwith Watchdog(600): time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        watched = subprocess.Popen(
            [sys.executable, "-c", program], env={**ENVIRONMENT, "IWM_WATCHED_PID": str(other.pid)}, cwd=ROOT
        )
        with pytest.raises(subprocess.TimeoutExpired):
            watched.wait(3)
        other.kill()
    assert watched.wait(HANG) == -signal.SIGTERM


@pytest.mark.long
def test_three_kills_of_a_job_leave_no_process_and_change_no_parameter(tiny_shards: Path, tmp_path: Path) -> None:
    tiny = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    words = [
        "demo",
        "--kills",
        "3",
        "--nodes",
        "2",
        "--data.shards",
        str(tiny_shards),
        "--schedule.steps",
        "400",
        *tiny,
    ]
    done = subprocess.run(
        [sys.executable, "benchmarks/kill_and_compare.py", str(tmp_path / "out"), *words, "--log.no-tensorboard"],
        cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit for bit the same" in done.stdout
    assert "3 kills, 0 processes left" in done.stdout
    assert metrics(tmp_path / "out" / "cut")[-1]["step"] == 400

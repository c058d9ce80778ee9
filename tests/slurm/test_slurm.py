"""Runs that a real Slurm requeues, stops at the time limit and preempts end like uninterrupted ones, bit for bit.

python -m pytest -m long -s tests/slurm   (root; Debian's packages slurmctld slurmd slurm-client munge)
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from iwm.training.checkpoint import load_newest
from tests.slurm.cluster import Cluster, missing, two_nodes
from tests.training.runs import arguments, assert_same

REASON = missing()
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(REASON is not None, reason=f"no Slurm cluster can be started here: {REASON}"),
]

STEPS = 2_400
"""Long enough that Slurm, which looks for time limits every 30 s, finds the run at work."""
CPU = ("--gpus-per-node=0", "--cpus-per-task=1")
"""Options that replace those of the project's files for GPUs."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as started:
        yield started


def training(shards: Path, run: Path, steps: int = STEPS) -> list[str]:
    fixed = ("--train.deterministic", "--data.val", "None", "--log.checkpoint-interval", "50", "--log.interval", "20")
    return arguments(shards, run, steps, *fixed)


def submit(cluster: Cluster, file: str, output: Path, words: list[str], *options: str) -> str:
    """Submit one of the project's files, from the root of the checkout; return the job's number."""
    tasks = ["--ntasks-per-node=1"] if file == "srun" else []
    line = ["sbatch", "--parsable", *CPU, *tasks, f"--output={output}", *options, f"slurm/{file}.sbatch", *words]
    return cluster.run(*line).strip()


class Submitted(NamedTuple):
    """A job that trains, and its files."""

    number: str
    run: Path
    output: Path


def submit_and_train(
    cluster: Cluster, file: str, shards: Path, folder: Path, *options: str, steps: int = STEPS
) -> Submitted:
    """Submit a training by one of the project's files; return the job once it is in mid-epoch."""
    run, output = folder / "run", folder / "out"
    number = submit(cluster, file, output, training(shards, run, steps), *options)
    wait_for_steps(run, output)
    return Submitted(number, run, output)


def wait_for_steps(run: Path, output: Path) -> None:
    """Wait until the run is in mid-epoch: an epoch has 13 steps, a line of metrics comes every 20."""
    deadline = time.monotonic() + 300
    file = run / "metrics.jsonl"
    while not (file.exists() and '"step": 60' in file.read_text()):
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)


def wait_for_requeue(cluster: Cluster, job: str, output: Path) -> None:
    """Wait until the job was requeued, and let it start soon instead of two minutes later.

    Not at once: the nodes refuse a job in the second in which they have ended it.
    """
    deadline = time.monotonic() + 300
    while (now := cluster.job(job))["Restarts"] == "0" or now["JobState"] != "PENDING":
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.2)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+10", "TimeLimit=60")


def shown(output: Path) -> str:
    """Print what a job said, without its lines of metrics."""
    said = output.read_text()
    print("\n".join(line[:200] for line in said.splitlines() if not line.startswith("step ")))
    return said


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on both nodes, started by srun alone from the command line."""
    run = tmp_path_factory.mktemp("whole") / "run"
    words = training(tiny_shards, run)
    said = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "python", "iwm/train.py", *words)
    assert "(2 processes × 4 images × 1 passes)" in said
    assert re.search(r"launched by srun, 2 nodes, rendezvous \S+:2\d{4}, Slurm job \d+", said)
    return run


def assert_ends_like(whole: Path, run: Path) -> None:
    one, other = load_newest(whole), load_newest(run)
    assert one is not None
    assert other is not None
    assert one.step == other.step == STEPS
    for part in ("model", "optimizer", "samples"):
        assert_same(getattr(one, part), getattr(other, part), part)
    assert len(other.loader["ranks"]) == 2


@pytest.mark.parametrize("file", ["srun", "torchrun"])
def test_a_requeued_job_resumes_exactly(
    cluster: Cluster, whole: Path, tiny_shards: Path, tmp_path: Path, file: str
) -> None:
    job, run, output = submit_and_train(cluster, file, tiny_shards, tmp_path)
    cluster.run("scontrol", "requeue", job)
    wait_for_requeue(cluster, job, output)
    ended = cluster.wait(job, "COMPLETED")
    said = shown(output)
    assert ended["Restarts"] == "1"
    assert re.search(r"stopped by a signal after step \d+", said)
    assert re.search(r"resuming from step \d+ ", said)
    assert "restart 1" in said
    assert_ends_like(whole, run)


@pytest.mark.parametrize("file", ["srun", "torchrun"])
def test_a_job_near_its_time_limit_saves_and_requeues_itself(
    cluster: Cluster, whole: Path, tiny_shards: Path, tmp_path: Path, file: str
) -> None:
    job, run, output = submit_and_train(cluster, file, tiny_shards, tmp_path)
    # The file's --signal asks for 120 s before the limit, which is now.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    wait_for_requeue(cluster, job, output)
    cluster.wait(job, "COMPLETED")
    said = shown(output)
    assert re.search(r"stopped by a signal after step [\d,]+", said)
    assert re.search(r"resuming from step [\d,]+ ", said)
    assert_ends_like(whole, run)


def test_a_preempted_job_resumes_exactly(cluster: Cluster, whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    options = ("--partition=low", "--exclusive")
    job, run, output = submit_and_train(cluster, "srun", tiny_shards, tmp_path, *options)
    cluster.run("srun", "--partition=high", "--nodes=2", "--exclusive", "hostname")
    wait_for_requeue(cluster, job, output)
    ended = cluster.wait(job, "COMPLETED")
    said = shown(output)
    assert ended["Restarts"] == "1"
    assert "DUE TO PREEMPTION" in said
    assert re.search(r"stopped by a signal after step [\d,]+", said)
    assert_ends_like(whole, run)


def test_a_cancelled_job_is_not_requeued(cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    job, _, output = submit_and_train(cluster, "srun", tiny_shards, tmp_path, steps=100_000)
    cluster.run("scancel", job)
    assert cluster.wait(job, "CANCELLED")["Restarts"] == "0"
    deadline = time.monotonic() + 300
    while "stopped by a signal" not in output.read_text() or cluster.run("squeue", "--noheader").strip():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.2)
    assert cluster.job(job)["JobState"] == "CANCELLED"


def test_one_torchrun_trains_on_a_node(cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    job, _, output = submit_and_train(cluster, "one-node", tiny_shards, tmp_path, steps=100_000)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_for_requeue(cluster, job, output)
    cluster.run("scancel", job)
    assert "stopped by a signal" in output.read_text()


def test_a_batch_scripts_own_line_trains_as_one_process(cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    words = " ".join(["python", "iwm/train.py", *training(tiny_shards, tmp_path / "run", 10)])
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--ntasks=2", f"--output={tmp_path / 'out'}", f"--wrap={words}"
    ).strip()
    cluster.wait(job, "COMPLETED")
    assert "(1 processes × 8 images" in (tmp_path / "out").read_text()


def test_jobs_of_an_array_train_runs_of_a_study(cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> None:
    bank = ["--bank.num-images", "2", "--bank.num-views", "8"]
    words = ["conditioning", "demo", "--out", str(tmp_path / "study"), *bank, "--"]
    options = arguments(tiny_shards, Path("unused"), 5)[3:]
    line = ["sbatch", "--parsable", *CPU, "--array=1,5", f"--output={tmp_path / 'out-%a'}", "slurm/study.sbatch"]
    cluster.run(*line, *words, *options)
    deadline = time.monotonic() + 600
    while cluster.run("squeue", "--noheader").strip():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    outputs = [(tmp_path / f"out-{number}").read_text() for number in (1, 5)]
    assert all(": trained in" in said for said in outputs), outputs
    assert len(list((tmp_path / "study").glob("*/eval/mrr-default.json"))) == 2

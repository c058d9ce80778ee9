"""Resuming after a kill at any time: finished shards are kept, and the result has the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from shard_sources import contents, make, slow_images

from shards.errors import ShardError
from shards.workers import ProgressCount
from shards.writer import ShardJob, ShardTask, SplitWorkdir, write_shard

ROOT = Path(__file__).parents[2]
SHARDS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take so long that a kill hits the middle of a shard."""
    return slow_images(tmp_path_factory.mktemp("source") / "src")


@pytest.fixture(scope="module")
def uninterrupted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    make(source, out, min_shards=SHARDS)
    return contents(out)


def start(source: Path, out: Path, workers: int = 2, *more: str) -> subprocess.Popen[str]:
    options = ["--min-shards", str(SHARDS), "--workers", str(workers), *more]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(source), str(out), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job inherits an ignored SIGINT; a job in a terminal does not.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def finish(source: Path, out: Path, *more: str) -> str:
    process = start(source, out, 2, *more)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return stdout


def records(out: Path, split: str = "train") -> int:
    return len(list((out / f".{split}.unfinished").glob("00*.json")))


def wait_for(condition, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of the spawned workers, without multiprocessing's resource tracker."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill_once(
    source: Path, out: Path, generator: random.Random, at_least: int, split: str = "train", *more: str
) -> None:
    """Start a run and kill it with SIGKILL shortly after `at_least` shards of the split are finished."""
    process = start(source, out, 2, *more)
    wait_for(lambda: records(out, split) >= at_least or process.poll() is not None)
    time.sleep(generator.uniform(0, 0.03))
    workers = workers_of(process) if process.poll() is None else []
    process.kill()
    process.communicate()
    wait_for(lambda: all(map(is_gone, workers)))


def test_two_splits_of_one_source_are_both_resumed(source, tmp_path):
    options = ("--val-fraction", "0.4")
    finish(source, tmp_path / "whole", *options)
    out = tmp_path / "out"
    for split in ("val", "train"):
        kill_once(source, out, random.Random(4), 2, split, *options)
    output = finish(source, out, *options)
    assert "already has the split 'val' with the same settings: nothing to do" in output
    assert contents(out) == contents(tmp_path / "whole")


def check_kills(source: Path, out: Path, uninterrupted: dict[str, bytes], moments: list[int]) -> None:
    generator = random.Random(0)
    for moment in moments:
        kill_once(source, out, generator, moment)
        assert not (out / "manifest.json").exists() or contents(out) == uninterrupted
        for name, data in contents_of_files(out).items():
            assert data == uninterrupted[name], f"{name} has its final name and is not whole"
    finish(source, out)
    assert contents(out) == uninterrupted


def contents_of_files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("train-*")} if out.exists() else {}


def test_killed_three_times_the_result_is_the_same_and_no_worker_stays(source, uninterrupted, tmp_path):
    check_kills(source, tmp_path / "out", uninterrupted, [0, 2, 6])


@pytest.mark.long
def test_killed_ten_times_the_result_is_the_same(source, uninterrupted, tmp_path):
    check_kills(source, tmp_path / "out", uninterrupted, list(range(10)))


def test_whole_shards_are_not_made_again(source, uninterrupted, tmp_path):
    out = tmp_path / "out"
    kill_once(source, out, random.Random(1), 4)
    finished = {path: path.stat().st_ino for path in out.glob("train-*") if (out / ".train.unfinished").exists()}
    whole = records(out)
    assert 4 <= whole < SHARDS
    output = finish(source, out)
    assert f"resuming: {whole} of {SHARDS} shards are finished" in output
    recorded = sum(path.stat().st_ino == inode for path, inode in finished.items())
    assert recorded >= 2 * whole
    assert contents(out) == uninterrupted


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_stopped_run_says_how_to_go_on_and_leaves_nothing_half_written(
    source, uninterrupted, tmp_path, number, workers
):
    out = tmp_path / "out"
    process = start(source, out, workers)
    wait_for(lambda: records(out) >= 2)
    children = workers_of(process)
    os.killpg(process.pid, number)  # workers receive a terminal's Ctrl-C and a batch system's SIGTERM too
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert stderr == "stopped; finished shards are kept; rerun the same command to resume\n"
    assert all(map(is_gone, children))
    assert not list(out.rglob("*.partial"))
    finish(source, out)
    assert contents(out) == uninterrupted


def test_a_worker_that_is_killed_ends_the_run_with_its_shard_named(source, uninterrupted, tmp_path):
    out = tmp_path / "out"
    process = start(source, out)
    wait_for(lambda: records(out) >= 1)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 1
    assert stderr.startswith("error: the worker process on shard train-0000")
    assert "memory ran out: use fewer --workers" in stderr
    finish(source, out)
    assert contents(out) == uninterrupted


def test_two_runs_cannot_make_the_same_split_at_once(source, tmp_path):
    out = tmp_path / "out"
    with SplitWorkdir(out, "train").lock(), pytest.raises(ShardError, match="another run is making 'train'"):
        make(source, out)
    assert not (out / ".train.unfinished").exists()


def test_an_interrupted_run_of_other_settings_is_refused_and_can_be_thrown_away(source, tmp_path):
    out = tmp_path / "out"
    kill_once(source, out, random.Random(2), 3)
    assert records(out) >= 3
    with pytest.raises(ShardError, match="interrupted run for split 'train' made with resize = None, this run has 32"):
        make(source, out, min_shards=SHARDS, resize=32)
    make(source, out, min_shards=SHARDS, resize=32, overwrite=True)
    make(source, tmp_path / "fresh", min_shards=SHARDS, resize=32)
    assert contents(out) == contents(tmp_path / "fresh")


def test_two_attempts_at_a_shard_at_once_do_not_disturb_each_other(source, uninterrupted, tmp_path, monkeypatch):
    def write_twice(job: ShardJob, task: ShardTask) -> Iterator[ProgressCount]:
        first, second = write_shard(job, task), write_shard(job, task)
        yield next(first)
        next(second)
        yield from first
        list(second)

    monkeypatch.setattr("shards.make.write_shard", write_twice)
    make(source, tmp_path / "out", min_shards=SHARDS)
    assert contents(tmp_path / "out") == uninterrupted


def test_a_record_whose_files_are_gone_or_cut_is_made_again(source, uninterrupted, tmp_path):
    out = tmp_path / "out"
    kill_once(source, out, random.Random(3), 4)
    tars = sorted(out.glob("*.tar"))
    tars[0].unlink()
    tars[1].write_bytes(tars[1].read_bytes()[:1000])
    finish(source, out)
    assert contents(out) == uninterrupted

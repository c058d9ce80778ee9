"""A run that was stopped in any way resumes exactly when the same command is rerun."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iwm.config import ConfigError
from iwm.train_config import LogConfig, OptimConfig
from iwm.training import checkpoint as checkpoints
from iwm.training import train_state
from iwm.training.checkpoint import CheckpointError, load_world_model
from iwm.training.runtime import StopFlag
from iwm.training.train_state import build_train_state, find_resume_checkpoint, run_lock
from tests.disks import small_disk
from tests.training.runs import alone, assert_same, command, finish, metrics, start, tiny_config, train_here, wait_until


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    file = run / "metrics.jsonl"
    wait_until(lambda: file.exists() and any(line["step"] >= step for line in whole_lines(run)), process)


def whole_lines(run: Path) -> list[dict[str, float]]:
    return metrics(run) if (run / "metrics.jsonl").read_text().endswith("\n") else []


def test_kill_9_and_sigterm_leave_a_run_that_ends_bit_for_bit_the_same(tiny_shards: Path, tmp_path: Path) -> None:
    steps = 150
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(command(tiny_shards, whole, steps))

    killed = start(command(tiny_shards, cut, steps))
    wait_for_step(cut, random.Random(0).randrange(15, 40), killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert checkpoints.list_checkpoints(cut), "nothing was saved before the kill"

    stopped = start(command(tiny_shards, cut, steps, "--stop-status", "75"))
    wait_for_step(cut, 60, stopped)
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=600)[0]
    assert stopped.returncode == 75, output
    assert "stopped by a signal" in output
    assert "resuming from step" in output

    finish(command(tiny_shards, cut, steps, "--stop-status", "75"))
    one, other = checkpoints.load_newest(whole), checkpoints.load_newest(cut)
    assert one is not None
    assert other is not None
    assert one.step == other.step == steps
    for part in ("model", "optimizer", "rng", "samples"):
        assert_same(getattr(one, part), getattr(other, part), part)
    # A stop shortens the window over which its line is averaged; later lines are the same.
    curves = [[line for line in metrics(run) if line["step"] > 100] for run in (whole, cut)]
    assert [(line["step"], line.get("loss")) for line in curves[0]] == [
        (line["step"], line.get("loss")) for line in curves[1]
    ]


def test_two_processes_resume_a_run_of_one_and_report_the_change(tiny_shards: Path, tmp_path: Path) -> None:
    train_here(tiny_config(tiny_shards, 30), tmp_path / "run", stop_after(tmp_path / "run", 10))
    output = finish(command(tiny_shards, tmp_path / "run", 30, processes=2))
    assert "world_size was 1, is 2" in output
    assert "a new epoch begins" in output
    after = checkpoints.load_newest(tmp_path / "run")
    assert after is not None
    assert (after.step, after.samples) == (30, 240)
    assert len(after.loader["ranks"]) == 2


def test_sigterm_to_torchrun_lets_all_processes_save_after_the_same_step(tiny_shards: Path, tmp_path: Path) -> None:
    launcher = start(command(tiny_shards, tmp_path, 100_000, "--data.val", "None", processes=2))
    wait_for_step(tmp_path, 15, launcher)
    launcher.send_signal(signal.SIGTERM)
    output = launcher.communicate(timeout=600)[0]
    stopped = re.search(r"stopped by a signal after step ([\d,]+)", output)
    assert stopped, output
    saved = checkpoints.load_newest(tmp_path)
    assert saved is not None
    assert saved.step == int(stopped[1].replace(",", ""))
    assert len(saved.loader["ranks"]) == 2


def stop_after(run: Path, step: int) -> StopFlag:
    """Return a stop flag that becomes True once `step` is in the metrics."""

    class After(StopFlag):
        def __bool__(self) -> bool:
            return (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in metrics(run))

    return After()


def test_other_settings_are_refused_by_name_and_harmless_ones_are_not(tiny_shards: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_shards, 5)
    train_here(config, tmp_path)
    with pytest.raises(ConfigError, match=r"--optim\.lr 0\.5 \(the run has 0\.0005\).*--run-dir"):
        find_resume_checkpoint(tmp_path, replace(config, optim=replace(config.optim, lr=0.5)))
    found, changes = find_resume_checkpoint(tmp_path, replace(config, log=replace(config.log, interval=7)))
    assert found is not None
    assert changes == ["log.interval: 5 → 7"]


def test_another_backend_of_the_pipeline_is_allowed_and_restarts_the_epoch(tiny_shards: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_shards, 5)
    train_here(config, tmp_path)
    changed = replace(config, data=replace(config.data, backend="cpu"))
    messages = build_train_state(changed, tmp_path, alone()).startup_messages
    assert "changed since the last checkpoint: data.backend: auto → cpu" in messages
    assert not any("a new epoch begins" in line for line in messages), "auto was cpu before"

    saved = checkpoints.load_newest(tmp_path)
    assert saved is not None
    saved.loader["ranks"][0]["backend"] = "gpu"
    checkpoints.save_checkpoint(tmp_path, saved)
    (restart,) = (x for x in build_train_state(changed, tmp_path, alone()).startup_messages if "a new epoch" in x)
    assert "backend was 'gpu', is 'cpu'" in restart


def test_a_finished_run_is_left_as_it_is(tiny_shards: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_shards, 5)
    train_here(config, tmp_path)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    train_here(config, tmp_path)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_two_trainings_cannot_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_state, "LOCK_WAIT", 0.0)
    refused = rf"in use by another training process \({os.getpid()} on host {socket.gethostname()}\); wait for it"
    with run_lock(tmp_path), pytest.raises(ConfigError, match=refused), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass


def test_a_training_waits_for_one_that_is_ending(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = threading.Event()
    release = threading.Event()

    def hold() -> None:
        with run_lock(tmp_path):
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    threading.Timer(0.5, release.set).start()
    with run_lock(tmp_path):
        holder.join(60)
    assert f"s for another training process ({os.getpid()} on host" in capsys.readouterr().out


def test_old_checkpoints_are_deleted_except_those_of_keep_every(tiny_shards: Path, tmp_path: Path) -> None:
    log = LogConfig(
        interval=5, checkpoint_interval=5, keep_last_k=2, keep_every=10, eval_interval=100, tensorboard=False
    )
    config = tiny_config(tiny_shards, 25, log=log)
    train_here(replace(config, data=replace(config.data, val=None)), tmp_path)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        f"step-{step:09d}.pt" for step in (25, 20, 10)
    ]


def test_a_full_disk_costs_no_old_checkpoint(tiny_shards: Path, tmp_path: Path, full_disk: Path) -> None:
    train_here(tiny_config(tiny_shards, 5), full_disk)
    saved = checkpoints.load_newest(full_disk)
    assert saved is not None
    filler = full_disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(full_disk).free - 4096))
    with pytest.raises(OSError, match="older checkpoints are untouched"):
        checkpoints.save_checkpoint(full_disk, replace(saved, step=6))
    filler.unlink()
    assert [path.name for path in (full_disk / "checkpoints").iterdir()] == ["step-000000005.pt"]
    assert_same(checkpoints.load_checkpoint(checkpoints.checkpoint_path(full_disk, 5)).model, saved.model)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a real file system of 3 MB."""
    with small_disk(tmp_path / "disk", "3m") as folder:
        yield folder


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(tiny_shards: Path, tmp_path: Path, damage: str) -> None:
    train_here(tiny_config(tiny_shards, 5), tmp_path)
    path = checkpoints.checkpoint_path(tmp_path, 5)
    content = path.read_bytes()
    if damage == "foreign":
        torch.save({"weights": torch.zeros(2)}, path)
    else:
        middle = len(content) // 2
        flipped = (
            content[:middle] + bytes(255 - byte for byte in content[middle : middle + 64]) + content[middle + 64 :]
        )
        path.write_bytes({"cut": content[:middle], "flipped": flipped, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=path.name):
        load_world_model(tmp_path)


def test_a_metric_line_that_was_cut_short_is_dropped(tiny_shards: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_shards, 20)
    train_here(config, tmp_path, stop_after(tmp_path, 10))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 999, "loss": 1.0}\n{"step": 12, "lo')
    train_here(config, tmp_path)
    assert max(line["step"] for line in metrics(tmp_path)) == 20


def test_a_run_whose_gradient_stays_broken_stops_and_names_the_samples(tiny_shards: Path, tmp_path: Path) -> None:
    broken = ("--optim.lr", "1e38", "--optim.start-lr", "1e38", "--train.max-nonfinite-steps", "3")
    output = finish(command(tiny_shards, tmp_path, 100, *broken), expect=1)
    last = output.strip().splitlines()[-1]
    assert last.startswith("iwm/train.py: the gradient was not finite in 3 steps in a row")
    named = last.partition("check the samples of the last step: ")[2].split(", ")
    assert len(named) == 8
    assert all("across" in key or "down" in key for key in named)
    assert "Traceback" not in output


def test_optim_values_of_the_run_stand_after_a_resume(tiny_shards: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_shards, 20, optim=OptimConfig(lr=1e-4, start_lr=1e-5, grad_clip=1.0))
    train_here(config, tmp_path, stop_after(tmp_path, 10))
    train_here(config, tmp_path)
    rates = {line["step"]: line["lr"] for line in metrics(tmp_path) if "lr" in line}
    assert len(set(rates.values())) == len(rates)

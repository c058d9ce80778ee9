"""Checkpoints are written while training goes on: what is copied, who waits for whom, and where failures end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from iwm.training import checkpoint as checkpoints
from iwm.training.checkpoint_writer import CheckpointWriter
from iwm.training.host_copies import HostCopies, tensors_of
from iwm.training.loop import TrainingError
from iwm.training.runtime import StopFlag
from tests.disks import small_disk
from tests.training.runs import alone, assert_same, command, finish, metrics, start, tiny_config, train_here, wait_until

CPU = torch.device("cpu")


def state() -> dict[str, Any]:
    return {
        "matrix": torch.randn(3, 5),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "column": torch.randn(4, 6)[:, 2],
        "repeated": torch.randn(1, 3).expand(4, 3),
        "list": [torch.tensor(7.0), torch.arange(3), torch.zeros(0, 4), torch.randn(5).bfloat16()],
        "words": ("a", 1, None, b"bytes"),
    }


def test_a_copy_has_the_values_of_its_moment_and_memory_of_its_own(tmp_path: Path) -> None:
    original, copies = state(), HostCopies(CPU, sharded_only=False)
    expected = [tensor.clone() for tensor in tensors_of(original)]
    copied = copies.copy(original)
    for tensor in tensors_of(original):
        tensor.copy_(torch.zeros(())) if tensor is not original["repeated"] else None
    for one, other in zip(tensors_of(copied), expected, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    assert copied["channels last"].stride() == original["channels last"].stride()
    assert copied["words"] == original["words"]
    torch.save(copied["matrix"], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 3000, "the file has the bytes of other tensors too"


def test_the_second_copy_takes_no_more_memory_than_the_first() -> None:
    copies = HostCopies(CPU, sharded_only=False)
    first = [tensor.data_ptr() for tensor in tensors_of(copies.copy(state())) if tensor.nbytes]
    size = copies.nbytes
    second = [tensor.data_ptr() for tensor in tensors_of(copies.copy(state())) if tensor.nbytes]
    assert (sorted(first), size) == (sorted(second), copies.nbytes)


def test_reserved_memory_is_that_of_the_first_copy() -> None:
    copies = HostCopies(CPU, sharded_only=False)
    copies.reserve(tensors_of(state()))
    size = copies.nbytes
    copies.copy(state())
    assert copies.nbytes == size == sum(tensor.nbytes for tensor in tensors_of(state()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: copies from a GPU and pinned memory")
def test_a_copy_from_a_gpu_is_made_in_the_order_of_its_stream() -> None:
    device = torch.device("cuda", 0)
    with torch.cuda.stream(torch.cuda.Stream()):
        tensors = [torch.full((1000, 1000), float(number), device=device) for number in range(20)]
        copies = HostCopies(device, sharded_only=False)
        copies.reserve(tensors)
        torch.cuda.set_sync_debug_mode("error")
        copied = copies.copy(tensors)
        for tensor in tensors:
            tensor.fill_(-1)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert [tensor.unique().tolist() for tensor in copied] == [[float(number)] for number in range(20)]
    assert all(tensor.is_pinned() for tensor in copied)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.long)])
def test_shards_of_all_processes_become_one_file(tmp_path: Path, processes: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    finish([sys.executable, *launcher, "tests/training/sharded_save.py", str(tmp_path / "out.pt")])
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["ranks"] == [{"rank": rank} for rank in range(processes)]
    assert found["saved"]["words"] == "same"
    saved = list(tensors_of(found["saved"]))
    assert len(saved) > 100
    assert_same(saved, found["expected"])
    assert [tensor.dtype for tensor in saved] == [tensor.dtype for tensor in found["expected"]]


class Disk:
    """Function to write with, which waits until it may go on, and fails as often as `errors` says."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors, self.written, self.open, self.began = list(errors), list[float](), threading.Event(), 0
        self.reported: list[OSError] = []

    def write(self, content: Any, ranks: list[Any]) -> None:
        self.began += 1
        assert self.open.wait(60)
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        self.written.append(content["value"].item())

    def writer(self) -> CheckpointWriter:
        return CheckpointWriter(alone(), self.write, self.reported.append)


def save(writer: CheckpointWriter, value: torch.Tensor) -> None:
    writer.save(lambda: ({"value": value}, None))


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits_for_it() -> None:
    disk, value = Disk(), torch.tensor([1.0])
    with disk.writer() as writer:
        save(writer, value)
        value += 1  # a step, while the disk does nothing
        writer.poll()
        assert disk.written == []
        waiting = threading.Thread(target=save, args=(writer, value))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive(), "two checkpoints are in flight"
        disk.open.set()
        waiting.join(60)
        value += 1
        assert writer.finish() is None
    assert disk.written == [1.0, 2.0]


def test_a_failure_is_reported_once_by_the_next_step_or_the_next_save() -> None:
    disk, full = Disk(OSError("full"), OSError("full again"), None), torch.tensor([1.0])
    disk.open.set()
    with disk.writer() as writer:
        save(writer, full)
        while not disk.reported:
            writer.poll()
        save(writer, full)
        save(writer, full)
        assert writer.finish() is None
        writer.poll()
    assert [str(error) for error in disk.reported] == ["full", "full again"]
    assert disk.written == [1.0]


def test_the_failure_of_the_last_checkpoint_is_returned_and_not_reported() -> None:
    disk = Disk(OSError("full"))
    disk.open.set()
    with disk.writer() as writer:
        save(writer, torch.tensor([1.0]))
        assert str(writer.finish()) == "full"
    assert disk.reported == []


def test_a_defect_in_the_thread_ends_the_training() -> None:
    disk = Disk(ValueError("a defect"))
    disk.open.set()
    with pytest.raises(ValueError, match="a defect"), disk.writer() as writer:
        save(writer, torch.tensor([1.0]))


def test_an_error_of_training_waits_for_the_checkpoint_and_is_the_one_that_is_raised() -> None:
    disk = Disk(RuntimeError("the other process is gone"))

    def train() -> None:
        with disk.writer() as writer:
            save(writer, torch.tensor([1.0]))
            disk.open.set()
            raise ValueError("in training")

    with pytest.raises(ValueError, match="in training") as raised:
        train()
    assert raised.value.__notes__ == ["the checkpoint that was being written failed too: the other process is gone"]
    assert disk.began == 1


BIG = ("--encoder.embed_dim", "256", "--encoder.depth", "4", "--data.val", "None", "--log.checkpoint-interval", "2")
"""Options of a run that writes a checkpoint of 50 MB every second step, which takes longer than the steps."""


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.long)])
def test_kill_9_while_a_checkpoint_is_written_leaves_the_one_before_whole(
    tiny_shards: Path, tmp_path: Path, kills: int
) -> None:
    steps, rng = 12 + 8 * kills, random.Random(time.time_ns())
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(command(tiny_shards, whole, steps, *BIG))
    for kill in range(kills):
        process = start(command(tiny_shards, cut, steps, *BIG))
        wait_until(lambda kill=kill: newest_step(cut) >= 4 + 8 * kill, process, every=0.001)
        wait_until(lambda: is_writing(cut), process, every=0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        found = checkpoints.load_newest(cut)
        assert found is not None
        assert found.step == newest_step(cut) < steps
    assert "resuming from step" in finish(command(tiny_shards, cut, steps, *BIG))
    one, other = checkpoints.load_newest(whole), checkpoints.load_newest(cut)
    assert one is not None
    assert other is not None
    for part in ("step", "samples", "model", "optimizer", "rng", "loader"):
        assert_same(getattr(one, part), getattr(other, part), part)
    assert not list((cut / "checkpoints").glob("*.partial"))


def is_writing(run: Path) -> bool:
    return any(path.stat().st_size for path in (run / "checkpoints").glob("*.partial"))


def newest_step(run: Path) -> int:
    return max((int(path.stem.removeprefix("step-")) for path in checkpoints.list_checkpoints(run)), default=0)


class AtStep(StopFlag):
    """Stop flag that is never set and calls a function after some steps."""

    def __init__(self, calls: dict[int, Callable[[], object]]) -> None:
        self.calls, self.step = calls, 0

    def __bool__(self) -> bool:
        self.step += 1
        self.calls.get(self.step, lambda: None)()
        return False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a real file system of 3 MB."""
    with small_disk(tmp_path / "disk", "3m") as folder:
        yield folder


def test_a_full_disk_is_a_warning_on_the_way_and_an_error_at_the_end(
    tiny_shards: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, filler = disk / "run", disk / "filler"
    config = tiny_config(tiny_shards, 30)

    def fill() -> None:
        filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 8192))

    train_here(config, run, AtStep({12: fill, 25: filler.unlink}))
    said = capsys.readouterr().out
    warning = "step-000000020.pt could not be written"
    assert said.count("WARNING") == said.count(warning) == 1, said
    assert (
        "older checkpoints are untouched). Free disk space" in said or "older checkpoints are untouched. Free" in said
    )
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000000010.pt", "step-000000030.pt"]

    for path in checkpoints.list_checkpoints(run)[:1]:
        path.unlink()
    with pytest.raises(TrainingError, match="the last checkpoint could not be written; free disk space and rerun"):
        train_here(config, run, AtStep({2: fill}))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000010.pt"]


def test_the_pause_is_in_the_line_of_the_window_that_begins_with_it(tiny_shards: Path, tmp_path: Path) -> None:
    train_here(tiny_config(tiny_shards, 25), tmp_path)
    paused = {line["step"]: line.get("checkpoint_pause") for line in metrics(tmp_path) if "loss" in line}
    assert [step for step, pause in paused.items() if pause is not None] == [15, 25]
    assert all(pause > 0 for pause in paused.values() if pause is not None)

"""Metrics are read when the device has computed them: in order, complete, and never before.

The device here is an imitation whose events complete two steps after they were recorded. Until then the values that are
on their way to the host are poison.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dali_pipelines.loader import ViewBatch, ViewLoader
from iwm.config import Config
from iwm.training import checkpoint as checkpoints
from iwm.training import loop, metric_window
from iwm.training.loop import TrainingError
from iwm.training.metric_window import MetricQueue, MetricWindow
from iwm.training.runtime import StopFlag
from iwm.training.step import StepResult
from tests.training.runs import alone, metrics, tiny_config, train_here

LATE = 2
"""Steps after which an event completes."""
MEASURED = {"images_per_second", "data_wait", "mfu", "memory_gib", "checkpoint_pause"}


class LateDevice:
    """Device that is LATE steps behind the host; a step takes it one second."""

    def __init__(self) -> None:
        self.step = 0
        self.copies: list[tuple[Tensor, Tensor]] = []

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        poison = torch.ones_like(tensor) if tensor.dtype == torch.bool else torch.full_like(tensor, torch.nan)
        self.copies.append((poison, tensor))
        return poison

    def record_event(self, device: torch.device) -> "LateEvent":
        event = LateEvent(self, self.step, self.copies)
        self.copies = []
        return event


class LateEvent:
    def __init__(self, device: LateDevice, step: int, copies: list[tuple[Tensor, Tensor]]) -> None:
        self.device, self.step, self.copies = device, step, copies

    def query(self) -> bool:
        if self.device.step >= self.step + LATE:
            self.synchronize()
        return self.device.step >= self.step + LATE

    def synchronize(self) -> None:
        for poison, value in self.copies:
            poison.copy_(value)

    def elapsed_time(self, end_event: "LateEvent") -> float:
        return 1000.0 * (end_event.step - self.step)


class EveryStep(StopFlag):
    """Stop flag, which is read after every step, and True after `end` steps."""

    def __init__(self, call: Callable[[int], None], end: int = 10**9) -> None:
        self.call, self.end, self.steps = call, end, 0

    def __bool__(self) -> bool:
        self.steps += 1
        self.call(self.steps)
        return self.steps >= self.end


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    device = LateDevice()
    monkeypatch.setattr(metric_window, "record_event", device.record_event)
    monkeypatch.setattr(metric_window, "copy_to_host", device.copy_to_host)
    return device


def without_validation(shards: Path, steps: int, **train: Any) -> Config:
    config = tiny_config(shards, steps)
    return replace(config, data=replace(config.data, val=None), train=replace(config.train, **train))


def lines_of(run: Path) -> list[dict[str, Any]]:
    whole = metrics(run) if (run / "metrics.jsonl").exists() else []
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in whole]


def test_lines_are_those_of_a_device_that_is_never_behind_and_come_late(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = without_validation(tiny_shards, 22)
    train_here(config, tmp_path / "at once")
    device = LateDevice()
    monkeypatch.setattr(metric_window, "record_event", device.record_event)
    monkeypatch.setattr(metric_window, "copy_to_host", device.copy_to_host)
    written: dict[int, int] = {}
    saved: dict[int, list[int]] = {}

    def observe(step: int) -> None:
        device.step = step
        for line in lines_of(tmp_path / "late"):
            written.setdefault(line["step"], step)

    save = checkpoints.save_checkpoint
    monkeypatch.setattr(
        checkpoints,
        "save_checkpoint",
        lambda run, content: (
            saved.update({content.step: [line["step"] for line in lines_of(run)]}) or save(run, content)
        ),
    )
    train_here(config, tmp_path / "late", EveryStep(observe))
    assert lines_of(tmp_path / "late") == lines_of(tmp_path / "at once")
    # Lines 10 and 20 are written before the checkpoints of the same steps; the others when their events have completed.
    # What is written in a step is seen after the next one.
    assert written == {5: 5 + LATE + 1, 10: 11, 15: 15 + LATE + 1, 20: 21}
    assert saved == {10: [5, 10], 20: [5, 10, 15, 20], 22: [5, 10, 15, 20, 22]}
    speeds = [line["images_per_second"] for line in metrics(tmp_path / "late")]
    assert speeds == [8.0] * 5, "8 images per step and second of the device"


def test_a_stop_loses_no_line(tiny_shards: Path, tmp_path: Path, device: LateDevice) -> None:
    train_here(without_validation(tiny_shards, 22), tmp_path, EveryStep(lambda step: setattr(device, "step", step), 6))
    assert [line["step"] for line in lines_of(tmp_path)] == [5, 6]
    assert all(line["loss"] is not None for line in lines_of(tmp_path))


def test_an_exception_loses_no_line_of_a_window_that_had_ended(
    tiny_shards: Path, tmp_path: Path, device: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, numbers = ViewLoader.__next__, count(1)

    def broken(loader: ViewLoader) -> ViewBatch:
        if next(numbers) == 7:
            raise RuntimeError("the disk is gone")
        return given(loader)

    monkeypatch.setattr(ViewLoader, "__next__", broken)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        train_here(without_validation(tiny_shards, 22), tmp_path, EveryStep(lambda step: setattr(device, "step", step)))
    assert device.step == 6
    assert [(line["step"], line["loss"] is None) for line in lines_of(tmp_path)] == [(5, False)]


def test_the_samples_of_the_step_that_reached_the_limit_are_named_though_later_steps_have_run(
    tiny_shards: Path, tmp_path: Path, device: LateDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[list[str]] = []
    step_of = loop.train_step

    def broken(model: Any, passes: Any, optimizer: Any, batches: list[ViewBatch], *rest: Any) -> StepResult:
        keys.append([key for batch in batches for key in batch.keys])
        result = step_of(model, passes, optimizer, batches, *rest)
        return result._replace(skipped=torch.tensor(len(keys) in (2, 4, 5, 6)))

    monkeypatch.setattr(loop, "train_step", broken)
    config = without_validation(tiny_shards, 22, max_nonfinite_steps=3)
    with pytest.raises(TrainingError, match="not finite in 3 steps in a row") as raised:
        train_here(config, tmp_path, EveryStep(lambda step: setattr(device, "step", step)))
    assert str(raised.value).endswith("step: " + ", ".join(keys[5]))
    assert len(keys[5]) == 8
    # The window of steps 6 to 10 ends at the checkpoint of step 10, which is not written.
    assert [(line["step"], line["skipped"]) for line in lines_of(tmp_path)] == [(5, 3)]
    assert len(keys) == 10
    assert not checkpoints.list_checkpoints(tmp_path)


def test_windows_are_written_oldest_first_and_once(device: LateDevice) -> None:
    written: list[float] = []

    def windows() -> Iterator[None]:
        for number in range(6):
            window = MetricWindow(torch.device("cpu"))
            device.step += 1
            window.results.append(StepResult(torch.tensor(float(number)), torch.tensor(1.0), torch.tensor(number == 2)))
            queue.append(window.end(alone(), 8), lambda metrics: written.append(metrics.loss.item()))
            queue.write_ready()
            yield

    with MetricQueue() as queue:
        for number, _ in enumerate(windows()):
            assert written == [float(done) for done in range(number + 1 - LATE)]
    assert written == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]

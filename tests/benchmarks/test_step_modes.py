"""Measurements of each mode: the parts of training that run, and the state that stays unchanged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from step_modes import (
    measure_data,
    measure_end_to_end,
    measure_interference,
    measure_model,
    measure_updates,
    new_train_state,
    resident_batches,
    token_counts,
)
from timing import StepTimings

from dali_pipelines.loader import ViewBatch
from iwm.training.train_state import TrainState
from tests.training.runs import alone, tiny_config


@pytest.fixture(scope="module")
def state(tiny_shards: Path) -> TrainState:
    return new_train_state(tiny_config(tiny_shards, steps=100), alone())


class Counted:
    """Loader that counts its batches and can be slowed down."""

    def __init__(self, loader: Iterator[ViewBatch], seconds: float = 0.0) -> None:
        self.loader, self.seconds, self.taken = loader, seconds, 0

    def __next__(self) -> ViewBatch:
        time.sleep(self.seconds)
        self.taken += 1
        return next(self.loader)


def counted(state: TrainState, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> Counted:
    loader = Counted(state.loader, seconds)
    monkeypatch.setattr(state, "loader", loader)
    return loader


def test_each_mode_runs_the_part_of_training_that_it_measures(
    state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, loader = resident_batches(state), counted(state, monkeypatch)

    def used(measure: Callable[[], StepTimings]) -> tuple[int, int, int]:
        step, taken = state.step, loader.taken
        return len(measure().steps), state.step - step, loader.taken - taken

    assert used(lambda: measure_data(state, 6)) == (6, 0, 6)
    assert used(lambda: measure_model(state, batches, 6)) == (6, 6, 0)
    assert used(lambda: measure_end_to_end(state, 6)) == (6, 6, 6)
    measured, steps, made = used(lambda: measure_interference(state, batches, 6))
    assert (measured, steps) == (6, 6)
    assert 0 < made <= 6, "beside the model the pipeline makes what its steps would use, no more"


def test_training_waits_for_data(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(state, monkeypatch, seconds=0.02)
    trained = measure_end_to_end(state, 5)
    assert 5 * 0.02 <= trained.waited <= trained.seconds


def test_the_model_beside_the_pipeline_waits_for_no_batch(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = resident_batches(state)
    first, seen = state.step, list[int]()

    class Held:
        """Loader whose first batch arrives after the last step."""

        def __next__(self) -> ViewBatch:
            end = time.monotonic() + 120
            while state.step < first + 5 and time.monotonic() < end:
                time.sleep(0.01)
            seen.append(state.step - first)
            return batches[0]

    monkeypatch.setattr(state, "loader", Held())
    assert len(measure_interference(state, batches, 5).steps) == 5
    assert seen[0] == 5


def test_an_error_of_the_pipeline_beside_the_model_is_not_lost(
    state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = resident_batches(state)
    monkeypatch.setattr(state, "loader", iter(()))
    with pytest.raises(StopIteration):
        measure_interference(state, batches, 2)


def test_measuring_optimiser_and_ema_leaves_the_parameters_as_they_are(state: TrainState) -> None:
    measure_model(state, resident_batches(state), 1)
    before = [p.detach().clone() for p in (*state.model.encoder.parameters(), *state.model.predictor.parameters())]
    windows = measure_updates(state, 3)
    assert {name: len(window.steps) for name, window in windows.items()} == {"optimiser": 3, "ema": 3}
    after = [*state.model.encoder.parameters(), *state.model.predictor.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_tokens_are_counted_as_masks_have_them(state: TrainState) -> None:
    counts = token_counts(state, steps=3)
    n = state.config.grid_size**2
    assert 0 < counts["context_encoder"]["needed"] <= counts["context_encoder"]["processed"] < n
    assert counts["predictor"] == counts["target_encoder"] == {"processed": n, "needed": n}

"""What each mode measures of a training session: which part of it runs, and what is left as it was."""

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
    open_subject,
    resident_batches,
    token_counts,
)
from stopwatch import Window

from dali_pipelines.loader import Batch
from iwm.training.session import Session
from tests.training.runs import alone, tiny_config


@pytest.fixture(scope="module")
def session(tiny_shards: Path) -> Session:
    return open_subject(tiny_config(tiny_shards, steps=100), alone())


class Counted:
    """The session's loader, counting its batches and, if asked, slow."""

    def __init__(self, loader: Iterator[Batch], seconds: float = 0.0) -> None:
        self.loader, self.seconds, self.taken = loader, seconds, 0

    def __next__(self) -> Batch:
        time.sleep(self.seconds)
        self.taken += 1
        return next(self.loader)


def counted(session: Session, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> Counted:
    loader = Counted(session.loader, seconds)
    monkeypatch.setattr(session, "loader", loader)
    return loader


def test_each_mode_runs_the_part_of_training_that_it_measures(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, loader = resident_batches(session), counted(session, monkeypatch)

    def used(measure: Callable[[], Window]) -> tuple[int, int, int]:
        step, taken = session.step, loader.taken
        return len(measure().steps), session.step - step, loader.taken - taken

    assert used(lambda: measure_data(session, 6)) == (6, 0, 6)
    assert used(lambda: measure_model(session, batches, 6)) == (6, 6, 0)
    assert used(lambda: measure_end_to_end(session, 6)) == (6, 6, 6)
    measured, steps, made = used(lambda: measure_interference(session, batches, 6))
    assert (measured, steps) == (6, 6)
    assert 0 < made <= 6, "beside the model the pipeline makes what its steps would use, no more"


def test_training_waits_for_data(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(session, monkeypatch, seconds=0.02)
    trained = measure_end_to_end(session, 5)
    assert 5 * 0.02 <= trained.waited <= trained.seconds


def test_the_model_beside_the_pipeline_waits_for_no_batch(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = resident_batches(session)
    first, seen = session.step, list[int]()

    class Held:
        """A loader whose first batch comes after the last step."""

        def __next__(self) -> Batch:
            end = time.monotonic() + 120
            while session.step < first + 5 and time.monotonic() < end:
                time.sleep(0.01)
            seen.append(session.step - first)
            return batches[0]

    monkeypatch.setattr(session, "loader", Held())
    assert len(measure_interference(session, batches, 5).steps) == 5
    assert seen[0] == 5


def test_an_error_of_the_pipeline_beside_the_model_is_not_lost(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = resident_batches(session)
    monkeypatch.setattr(session, "loader", iter(()))
    with pytest.raises(StopIteration):
        measure_interference(session, batches, 2)


def test_measuring_optimiser_and_ema_leaves_the_parameters_as_they_are(session: Session) -> None:
    measure_model(session, resident_batches(session), 1)
    before = [p.detach().clone() for p in (*session.model.encoder.parameters(), *session.model.predictor.parameters())]
    windows = measure_updates(session, 3)
    assert {name: len(window.steps) for name, window in windows.items()} == {"optimiser": 3, "ema": 3}
    after = [*session.model.encoder.parameters(), *session.model.predictor.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_tokens_are_counted_as_masks_have_them(session: Session) -> None:
    counts = token_counts(session, steps=3)
    n = session.config.grid**2
    assert 0 < counts["context_encoder"]["needed"] <= counts["context_encoder"]["processed"] < n
    assert counts["predictor"] == counts["target_encoder"] == {"processed": n, "needed": n}

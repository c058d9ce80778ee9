"""Sweep over the pipeline's settings: its choices, and training with the options that it prints."""

from __future__ import annotations

import io
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import autotune
import loader_rates
import numpy as np
import pytest
import torch
from autotune import (
    LoaderSetup,
    SettingSweep,
    choose,
    loader_setup,
    measured,
    run,
    sweeps_for,
)
from environment import BenchmarkError
from loader_rates import decoder_size_hint
from options import TuneOptions
from rich.console import Console

from dali_pipelines.loader import ViewLoader
from dali_pipelines.views import Views
from iwm.config import ConfigError
from iwm.train_options import parse
from tests.dali_pipelines.pipeline_shards import jpeg, photographs_and_noise, write_split

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    write_split(folder, "train", photographs_and_noise(24, side=40), per_shard=(12, 12))
    return folder


def test_the_first_that_keeps_up_is_chosen_turn_by_turn() -> None:
    # The machine halves its speed in the last turn: 2 is still as fast as 4, 1 never is.
    rates: dict[int, list[float]] = {1: [50, 51, 52, 25], 2: [99, 100, 99, 50], 4: [100, 101, 100, 50.5]}
    value, why = choose(rates)
    assert value == 2
    assert why == "4 is the fastest; 2 keeps up, at 0.99 of its speed in the median"
    assert choose({1: [50, 51], 2: [99, 100]})[0] == 2


def test_threads_and_queue_depth_are_swept_on_every_machine() -> None:
    threads, prefetch = sweeps_for(6)
    assert (threads.setting, threads.candidates) == ("num_threads", [1, 2, 4, 6])
    assert prefetch.setting == "prefetch_queue_depth"
    assert prefetch.paced


def test_training_takes_the_options_that_are_printed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "loader_threads", lambda device, processes: 2)
    options = TuneOptions("demo", shards=shards, device="cpu", batch_size=4, seconds=0.05, repeats=2)
    result, data = printed_options(options)
    assert (result["training"], data.backend) == ({}, "auto")
    assert set(result["data"]) == {"num_threads", "prefetch_queue_depth"}
    assert [list(sweep["images_per_second"]) for sweep in result["sweeps"]] == [["1", "2"], ["1", "2", "3", "4"]]
    assert all(len(turns) == 2 for sweep in result["sweeps"] for turns in sweep["images_per_second"].values())
    assert {name: getattr(data, name) for name in result["data"]} == result["data"]


class FakeGpu:
    """Rates of a machine with a GPU: of pipelines by their settings, and of training by the candidate's name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, training: dict[str, float]) -> None:
        self.training, self.trained, self.swept = training, dict[str, dict[str, Any]](), list[dict[str, Any]]()
        setup = LoaderSetup(Path("unused"), "train", Views(), 4, torch.device("cuda", 0), 8)
        monkeypatch.setattr("iwm.training.runtime.HAS_TRITON", True)
        monkeypatch.setattr(autotune, "loader_setup", lambda options, console: setup)
        monkeypatch.setattr(autotune, "decoder_size_hint", lambda folder, split: (640, 480))
        monkeypatch.setattr(autotune, "rate", self.rate)
        monkeypatch.setattr(autotune, "training_rates", self.training_rates)

    def rate(self, work: LoaderSetup, settings: dict[str, Any], seconds: float, pause: float) -> float:
        """Return a rate that grows up to four threads."""
        self.swept.append(dict(settings))
        return 100.0 * min(4, settings.get("num_threads", 8))

    def training_rates(
        self, recipe: str, options: TuneOptions, work: LoaderSetup, candidates: dict[str, Any], console: Console
    ) -> dict[str, list[float]]:
        self.trained = candidates
        return {name: [self.training.get(name, 50.0)] * 3 for name in candidates}


def printed_options(options: TuneOptions) -> tuple[dict[str, Any], Any]:
    """Return tune's results and the data options of the command that it prints."""
    console = Console(file=io.StringIO(), width=200)
    result = run(options, console)
    printed = next(line for line in console.file.getvalue().splitlines() if line.startswith("iwm/train.py "))
    return json.loads(json.dumps(result)), parse(printed.split()[1:]).config.data


def test_on_a_gpu_backend_and_decoder_are_chosen_by_the_speed_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeGpu(monkeypatch, {"gpu, nvJPEG": 90.0, "triton, engine": 97.0, "cpu": 80.0})
    result, data = printed_options(TuneOptions("demo", repeats=1))
    assert list(result["training"]) == list(machine.trained)
    assert len(machine.trained) == 3 + 3 + 1
    assert result["training"]["triton, engine"] == [97.0] * 3
    assert {name: getattr(data, name) for name in result["data"]} == result["data"]
    engine = {"hw_decoder_load": 0.65, "decoder_device": "gpu", "decoder_width_hint": 640, "decoder_height_hint": 480}
    # Four threads are as fast as eight.
    assert result["data"] == {"backend": "triton", **engine, "num_threads": 4, "prefetch_queue_depth": 1}
    # Only the chosen pipeline is swept.
    assert all(settings["backend"] == "triton" and "hw_decoder_load" in settings for settings in machine.swept)


@pytest.mark.parametrize(
    ("training", "chosen"),
    [
        ({"gpu, nvJPEG": 99.0, "triton, nvJPEG": 100.0, "cpu": 98.5}, ("gpu", "gpu")),
        ({"gpu, nvJPEG": 90.0, "triton, decoded on CPU cores": 99.0, "cpu": 100.0}, ("triton", "cpu")),
        ({"gpu, nvJPEG": 90.0, "triton, nvJPEG": 90.0, "cpu": 100.0}, ("cpu", "gpu")),
    ],
)
def test_the_first_candidate_that_keeps_up_is_chosen(
    training: dict[str, float], chosen: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpu(monkeypatch, training)
    _, data = printed_options(TuneOptions("demo", repeats=1))
    assert (data.backend, data.decoder_device) == chosen


def test_one_candidate_needs_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeGpu(monkeypatch, {})
    result, data = printed_options(TuneOptions("demo", repeats=1, backends=("cpu",)))
    assert (result["training"], machine.trained, data.backend) == ({}, {}, "cpu")


def test_a_backend_that_the_machine_lacks_is_left_out_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, {})
    monkeypatch.setattr("iwm.training.runtime.HAS_TRITON", False)
    console = Console(file=io.StringIO(), width=200)
    candidates = run(TuneOptions("demo", repeats=1), console)["training"]
    assert list(candidates) == ["gpu, nvJPEG", "gpu, engine", "gpu, decoded on CPU cores", "cpu"]
    assert "without triton: --backends triton: torch came without Triton" in console.file.getvalue()
    with pytest.raises(ConfigError, match="torch came without Triton"):
        run(TuneOptions("demo", backends=("triton",)), QUIET)


def test_training_is_measured_with_each_pipeline_in_turns(tiny_shards: Path) -> None:
    work = LoaderSetup(tiny_shards, "train", Views(size=32), 4, torch.device("cpu"), 1)
    candidates = {"one": {"backend": "cpu"}, "deep": {"backend": "cpu", "prefetch_queue_depth": 3}}
    options = TuneOptions("demo", "jitter", seconds=0.05, repeats=2)
    rates = loader_rates.training_rates("demo", options, work, candidates, QUIET)
    assert list(rates) == ["one", "deep"]
    assert all(len(turns) == 2 and min(turns) > 0 for turns in rates.values())


def test_never_two_pipelines_are_there_at_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[weakref.ref[ViewLoader]] = []
    threads: list[int] = []

    class Counted(ViewLoader):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            assert [loader() for loader in built if loader() is not None] == []
            super().__init__(*arguments, **options)
            built.append(weakref.ref(self))
            threads.append(options["num_threads"])

    monkeypatch.setattr(loader_rates, "ViewLoader", Counted)
    options = TuneOptions("demo", shards=shards, device="cpu", batch_size=4, seconds=0.01, repeats=2)
    rates = measured(loader_setup(options, QUIET), SettingSweep("num_threads", (1, 2)), {}, options, QUIET)
    assert threads == [1, 2, 1, 2], "candidates take turns"
    assert {value: len(turns) for value, turns in rates.items()} == {1: 2, 2: 2}
    assert [loader() for loader in built if loader() is not None] == []


def test_memory_is_asked_for_by_sides_that_all_but_a_hundredth_have(tmp_path: Path) -> None:
    sides = [(30, 20), (10, 64), *[(16, 16)] * 196, (400, 8), (8, 400)]
    write_split(tmp_path, "train", [jpeg(np.zeros((*side, 3), np.uint8)) for side in sides], per_shard=(100, 100))
    assert decoder_size_hint(tmp_path, "train") == (20, 16)
    assert decoder_size_hint(tmp_path, "train", images=1) == (20, 30)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"recipe": "no_such"}, "--recipe no_such: does not exist; choose from"),
        ({"batch_size": 25}, "--batch-size 25: .* has only 24 images"),
    ],
)
def test_a_mistake_names_the_option(shards: Path, mistake: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        run(replace(TuneOptions(shards=shards, device="cpu"), **mistake), QUIET)

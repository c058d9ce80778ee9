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
    choose_share,
    decoder_share,
    loader_setup,
    measured,
    run,
    sweeps_for,
)
from environment import BenchmarkError
from loader_rates import decoder_size_hint
from options import TuneOptions
from rich.console import Console

from dali_pipelines.augmentations import Views
from dali_pipelines.loader import ViewLoader
from iwm import recipes
from iwm.config import ConfigError
from tests.dali_pipelines.pipeline_shards import jpeg, photographs_and_noise, write_split

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    write_split(folder, "train", photographs_and_noise(24, side=40), per_shard=(12, 12))
    return folder


def test_the_first_that_keeps_up_is_chosen_turn_by_turn() -> None:
    # The machine halves its speed in the last turn: 2 is still as fast as 4, 1 never is.
    rates: dict[int | float, list[float]] = {1: [50, 51, 52, 25], 2: [99, 100, 99, 50], 4: [100, 101, 100, 50.5]}
    value, why = choose(rates)
    assert value == 2
    assert why == "4 is the fastest; 2 keeps up, at 0.99 of its speed in the median"
    assert choose({1: [50, 51], 2: [99, 100]})[0] == 2


def test_a_gpu_has_its_decoder_swept_and_a_cpu_does_not() -> None:
    assert [sweep.setting for sweep in sweeps_for("cpu", 6)] == ["num_threads", "prefetch_queue_depth"]
    decoder, threads, prefetch = sweeps_for("gpu", 6)
    assert threads.candidates == [1, 2, 4, 6]
    assert decoder.candidates[0] == 1.0
    assert set(decoder.candidates) == {0.0, 0.5, 0.65, 0.8, 1.0}
    assert prefetch.paced


def test_training_takes_the_options_that_are_printed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "loader_threads", lambda device, processes: 2)
    options = TuneOptions("demo", shards=shards, device="cpu", batch_size=4, seconds=0.05, repeats=2)
    result, data = printed_options(options)
    assert (result["backend"], result["training"], data.backend) == ("cpu", {}, "auto")
    assert set(result["data"]) == {"num_threads", "prefetch_queue_depth"}
    assert [list(sweep["images_per_second"]) for sweep in result["sweeps"]] == [["1", "2"], ["1", "2", "3", "4"]]
    assert all(len(turns) == 2 for sweep in result["sweeps"] for turns in sweep["images_per_second"].values())
    assert {name: getattr(data, name) for name in result["data"]} == result["data"]


class FakeGpu:
    """Rates of a machine with a GPU: of pipelines by backend and settings, and of training by backend."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, training: dict[str, float]) -> None:
        self.training, self.trained, self.built = training, dict[str, dict[str, Any]](), list[str]()
        setup = LoaderSetup(Path("unused"), "train", Views(), 4, torch.device("cuda", 0), 8)
        monkeypatch.setattr("iwm.training.runtime.HAS_TRITON", True)
        monkeypatch.setattr(autotune, "loader_setup", lambda options, console: setup)
        monkeypatch.setattr(autotune, "decoder_size_hint", lambda folder, split: (640, 480))
        monkeypatch.setattr(autotune, "model_rate", lambda recipe, work, console: 100.0)
        monkeypatch.setattr(autotune, "rate", self.rate)
        monkeypatch.setattr(autotune, "training_rates", self.training_rates)

    def rate(self, work: LoaderSetup, settings: dict[str, Any], seconds: float, pause: float) -> float:
        """Return a rate that grows up to four threads and with decoding outside of the hardware."""
        assert work.backend is not None
        self.built.append(work.backend)
        return (150 - 40 * settings.get("hw_decoder_load", 0)) * min(4, settings.get("num_threads", 8)) / 4

    def training_rates(
        self, recipe: str, scenario: str | None, work: LoaderSetup, settings: dict[str, Any], console: Console
    ) -> list[float]:
        assert work.backend is not None
        self.trained[work.backend] = dict(settings)
        return [self.training[work.backend]] * 3


def printed_options(options: TuneOptions) -> tuple[dict[str, Any], Any]:
    """Return tune's results and the data options of the command that it prints."""
    console = Console(file=io.StringIO(), width=200)
    result = run(options, console)
    printed = next(line for line in console.file.getvalue().splitlines() if line.startswith("iwm/train.py "))
    return json.loads(json.dumps(result)), recipes.parse(printed.split()[1:]).config.data


def test_on_a_gpu_the_backend_is_chosen_by_the_speed_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeGpu(monkeypatch, {"gpu": 90.0, "triton": 97.0, "cpu": 80.0})
    result, data = printed_options(TuneOptions("demo", repeats=1))
    assert result["training"] == {"gpu": [90.0] * 3, "triton": [97.0] * 3, "cpu": [80.0] * 3}
    assert (result["backend"], data.backend) == ("triton", "triton")
    assert {name: getattr(data, name) for name in result["data"]} == result["data"]
    # 0.5 is the largest share with 1.3 times the model's 100 images/s; four threads are as fast as eight.
    decoded = {"decoder_width_hint": 640, "decoder_height_hint": 480, "hw_decoder_load": 0.5, "num_threads": 4}
    assert result["data"] == {**decoded, "prefetch_queue_depth": 1}
    # The CPU and the decoder do the same for gpu and triton, which are swept once.
    assert machine.trained["gpu"] == machine.trained["triton"] == result["data"]
    assert set(machine.built) == {"gpu", "cpu"}
    assert machine.trained["cpu"] == {"num_threads": 4, "prefetch_queue_depth": 1}


@pytest.mark.parametrize(
    ("training", "chosen"),
    [
        ({"gpu": 99.0, "triton": 100.0, "cpu": 98.5}, "gpu"),
        ({"gpu": 90.0, "triton": 90.0, "cpu": 100.0}, "cpu"),
        ({"gpu": 90.0, "triton": 99.0, "cpu": 100.0}, "triton"),
    ],
)
def test_the_first_backend_that_keeps_up_is_chosen(
    training: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpu(monkeypatch, training)
    result, data = printed_options(TuneOptions("demo", repeats=1))
    assert (result["backend"], data.backend) == (chosen, chosen)
    assert ("hw_decoder_load" in result["data"]) == (chosen != "cpu")


def test_one_backend_needs_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeGpu(monkeypatch, {})
    result, data = printed_options(TuneOptions("demo", repeats=1, backends=("cpu",)))
    assert (result["training"], machine.trained, data.backend) == ({}, {}, "cpu")


def test_a_backend_that_the_machine_lacks_is_left_out_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, {"gpu": 90.0, "cpu": 100.0})
    monkeypatch.setattr("iwm.training.runtime.HAS_TRITON", False)
    console = Console(file=io.StringIO(), width=200)
    assert list(run(TuneOptions("demo", repeats=1), console)["training"]) == ["gpu", "cpu"]
    assert "without triton: --backends triton: torch came without Triton" in console.file.getvalue()
    with pytest.raises(ConfigError, match="torch came without Triton"):
        run(TuneOptions("demo", backends=("triton",)), QUIET)


def test_training_is_measured_by_the_users_command_with_the_chosen_settings(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_rates, "IN_TURNS", ("--seconds", "0.1", "--repeats", "2", "--warmup", "1"))
    work = LoaderSetup(tiny_shards, "train", Views(), 4, torch.device("cpu"), 1, "cpu")
    settings = {"num_threads": 1, "prefetch_queue_depth": 3}
    rates = loader_rates.training_rates("demo", "jitter", work, settings, QUIET)
    assert len(rates) == 2
    assert min(rates) > 0
    with pytest.raises(BenchmarkError, match="the rate of mode end-to-end could not be measured"):
        loader_rates.training_rates("demo", None, work._replace(split="absent"), settings, QUIET)


def test_the_largest_share_that_leaves_the_model_room_is_chosen_not_the_fastest_alone() -> None:
    rates: dict[int | float, list[float]] = {1.0: [100, 101], 0.8: [135, 134], 0.65: [180, 181], 0.0: [140, 141]}
    value, why = choose_share(rates, 100)
    assert value == 0.8
    assert why == "0.8 is the largest share with 1.3 times the model's 100 images/s (1.34)"
    assert choose_share(rates, 70)[0] == 1.0
    value, why = choose_share(rates, 200)
    assert value == 0.65
    assert why.startswith("none reaches 1.3 times the model's 200 images/s; 0.65 is the fastest")


def test_other_shares_are_measured_only_where_the_first_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int | float, ...]] = []

    def rates(work: LoaderSetup, sweep: SettingSweep, *rest: object) -> dict[int | float, list[float]]:
        seen.append(tuple(sweep.candidates))
        return {value: [100.0, 100.0] for value in sweep.candidates}

    monkeypatch.setattr(autotune, "measured", rates)
    decoder = sweeps_for("triton", 2)[0]
    work = LoaderSetup(Path("unused"), "train", Views(), 4, torch.device("cpu"), 1)
    assert decoder_share(work, decoder, {}, 50.0, TuneOptions(), QUIET)[1] == 1.0
    assert decoder_share(work, decoder, {}, 99.0, TuneOptions(), QUIET)[1] == 1.0
    assert seen == [(1.0,), (1.0,), (1.0, 0.8, 0.65, 0.5, 0.0)]


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

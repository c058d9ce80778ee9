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
    assert [sweep.setting for sweep in sweeps_for(torch.device("cpu"), 6)] == ["num_threads", "prefetch_queue_depth"]
    decoder, threads, prefetch = sweeps_for(torch.device("cuda"), 6)
    assert threads.candidates == [1, 2, 4, 6]
    assert decoder.candidates[0] == 1.0
    assert set(decoder.candidates) == {0.0, 0.5, 0.65, 0.8, 1.0}
    assert prefetch.paced


def test_training_takes_the_options_that_are_printed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "loader_threads", lambda device, processes: 2)
    console = Console(file=io.StringIO(), width=200)
    result = run(TuneOptions("demo", shards=shards, device="cpu", batch_size=4, seconds=0.05, repeats=2), console)
    assert json.loads(json.dumps(result))["data"] == result["data"]
    assert set(result["data"]) == {"num_threads", "prefetch_queue_depth"}
    assert [list(sweep["images_per_second"]) for sweep in result["sweeps"]] == [["1", "2"], ["1", "2", "3", "4"]]
    assert all(len(turns) == 2 for sweep in result["sweeps"] for turns in sweep["images_per_second"].values())
    printed = next(line for line in console.file.getvalue().splitlines() if line.startswith("iwm/train.py "))
    data = recipes.parse(printed.split()[1:]).config.data
    assert {name: getattr(data, name) for name in result["data"]} == result["data"]


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
    decoder = sweeps_for(torch.device("cuda"), 2)[0]
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

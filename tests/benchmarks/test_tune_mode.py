"""The sweep over the pipeline's settings: what it chooses, what it writes, and that training takes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tune_mode
from mistakes import BenchmarkError
from rich.console import Console
from tune_mode import Tune, choose, largest_sides, run, sweeps_for

from iwm import train
from iwm.training.tuned import read_tuned
from tests.dali_pipelines.pipeline_shards import jpeg, photographs_and_noise, write_split

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    write_split(folder, "train", photographs_and_noise(24, side=40), per_shard=(12, 12))
    return folder


def test_the_first_that_keeps_up_is_chosen_turn_by_turn() -> None:
    # The machine halves its speed in the last turn: 2 keeps up with 4 all the same, 1 never does.
    rates: dict[int | float, list[float]] = {1: [50, 51, 52, 25], 2: [99, 100, 99, 50], 4: [100, 101, 100, 50.5]}
    value, why = choose(rates)
    assert value == 2
    assert why == "4 is the fastest; 2 keeps up, at 0.99 of its speed in the median"
    assert choose({1: [50, 51], 2: [99, 100]})[0] == 2


def test_a_gpu_has_its_decoder_swept_and_a_cpu_does_not() -> None:
    assert [sweep.setting for sweep in sweeps_for(torch.device("cpu"), 6)] == ["threads", "prefetch"]
    threads, decoder, prefetch = sweeps_for(torch.device("cuda"), 6)
    assert threads.candidates == [1, 2, 4, 6]
    assert set(decoder.candidates) == {0.0, 0.5, 0.65, 0.8, 1.0}
    assert prefetch.paced


def test_the_file_is_what_training_reads(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_mode, "available_cores", lambda: 2)
    out = tmp_path / "new folder" / "tuned.yaml"
    result = run(Tune("demo", shards=shards, device="cpu", batch=4, seconds=0.05, repeats=2, out=out), QUIET)
    assert json.loads(json.dumps(result))["data"] == read_tuned(out).data == result["data"]
    assert set(result["data"]) == {"threads", "prefetch"}
    assert [list(sweep["images_per_second"]) for sweep in result["sweeps"]] == [["1", "2"], ["1", "2", "3", "4"]]
    assert all(len(turns) == 2 for sweep in result["sweeps"] for turns in sweep["images_per_second"].values())
    assert train.parse(["demo", "--tuned", str(out)]).config.data.prefetch == result["data"]["prefetch"]


def test_memory_is_asked_for_by_the_largest_sides_of_the_data(tmp_path: Path) -> None:
    images = [jpeg(np.zeros((*sides, 3), np.uint8)) for sides in ((30, 20), (10, 64), (50, 8))]
    write_split(tmp_path, "train", images, per_shard=(2, 1))
    assert largest_sides(tmp_path, "train") == (64, 50)
    assert largest_sides(tmp_path, "train", images=1) == (20, 30)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"recipe": "no_such"}, "--recipe no_such: there is none of that name"),
        ({"batch": 25}, "--batch 25: .* has only 24 images"),
        ({"out": Path("/")}, "--out /: no file can be written there"),
    ],
)
def test_a_mistake_names_the_option(shards: Path, tmp_path: Path, mistake: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        run(replace(Tune(shards=shards, device="cpu", out=tmp_path / "tuned.yaml"), **mistake), QUIET)

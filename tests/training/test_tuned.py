"""The file of tuned settings: over the recipe, under single options, refused by name, and frank about its machine."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from iwm import train
from iwm.config import Data
from iwm.training.resume import MAY_CHANGE
from iwm.training.tuned import SETTINGS, Machine, Tuned, read_tuned, this_machine, write_tuned

HERE = this_machine(torch.device("cpu"), processes=1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tuned.yaml"
    write_tuned(Tuned(path, {"threads": 3, "prefetch": 4, "hw_decoder_load": 0.8}, HERE))
    return path


def test_what_is_written_is_read(file: Path) -> None:
    assert read_tuned(file) == Tuned(file, {"threads": 3, "prefetch": 4, "hw_decoder_load": 0.8}, HERE)


def test_the_file_is_over_the_recipe_and_single_options_are_over_the_file(file: Path) -> None:
    data = train.parse(["demo", "--tuned", str(file), "--data.prefetch", "1"]).config.data
    assert (data.threads, data.prefetch, data.hw_decoder_load) == (3, 1, 0.8)
    assert replace(data, threads=0, prefetch=2, hw_decoder_load=0.65) == train.parse(["demo"]).config.data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {thread: 3}", "data.thread is unknown; there are threads, prefetch"),
        ("data: {threads: many}", "data.threads 'many' must be of type int"),
        ("data: {threads: 2.5}", "data.threads 2.5 must be of type int"),
        ("data: {prefetch: true}", "data.prefetch True must be of type int"),
        ("dat: {threads: 3}", "dat is unknown; there are data, made_on"),
        ("- 3", "the file is no mapping"),
        ("data: [3]", "data [3] must be of type dict"),
        ("data: {threads: 3}", "made_on.processor is missing"),
        ("data: {threads: 3", "it is no YAML"),
        (None, "it cannot be read: No such file"),
    ],
)
def test_a_file_that_is_not_one_is_one_line_and_exit_1(
    content: str | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "tuned.yaml"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["iwm/train.py", "demo", "--tuned", str(path)])
    assert train.main() == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"iwm/train.py: --tuned {path}: ")
    assert message in line
    assert "throughput.py tune" in line


def test_what_can_be_tuned_are_fields_that_a_run_may_change_when_it_goes_on() -> None:
    kinds = get_type_hints(Data)
    assert {name: kinds[name] for name in SETTINGS} == SETTINGS
    assert all(f"data.{name}".startswith(MAY_CHANGE) for name in SETTINGS)


def test_a_value_out_of_range_is_the_configurations_error(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tuned(Tuned(file, {"hw_decoder_load": 65}, HERE))
    monkeypatch.setattr(sys, "argv", ["iwm/train.py", "demo", "--tuned", str(file)])
    assert train.main() == 1
    assert "data.hw_decoder_load 65 is no share" in capsys.readouterr().err


def test_another_machine_is_named_in_the_opening(file: Path) -> None:
    (said,) = read_tuned(file).remarks(HERE)
    assert said == f"tuned by {file}: data.threads 3, data.prefetch 4, data.hw_decoder_load 0.8"
    _, other = read_tuned(file).remarks(Machine("another", HERE.cores, "a GPU", 8))
    assert f"processor {HERE.processor} (here another), gpu None (here a GPU), processes 1 (here 8)" in other
    assert "cores" not in other

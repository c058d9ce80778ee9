"""Figures of data past one machine: sizes equal those of real shards, and docs/scaling.md shows the printed tables."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import scaling_data
from scaling_data import MAPPED_TARS, TABLES, ScalingDataOptions, figures, staging_seconds

from shards.command_line import run_command
from shards.format import format_index
from shards.listing import sample_key
from shards.samples import FileRef, Sample, SampleTable
from shards.writer import TarWriter

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


def command(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["scaling_data.py", *arguments])
    return run_command(scaling_data.main, "scaling_data.py")


def test_sizes_are_those_of_a_real_shard() -> None:
    images = 2000
    tar = TarWriter(io.BytesIO())
    index = []
    for place in range(images):
        key = sample_key(f"n01440764/n01440764_{10000 + place}")
        index.append([tar.add(key, "jpg", bytes(30_000 + place)), tar.add(key, "cls", b"123")])
    options = ScalingDataOptions(bytes_per_image=30_000 + (images - 1) / 2)
    found = figures(images, options)
    assert found.tar_bytes == pytest.approx(tar.size, rel=1e-3)
    assert found.index_bytes == pytest.approx(len(format_index(index)), rel=0.01)


def test_the_tables_size_is_that_of_a_real_table() -> None:
    names = [f"n01440764/n01440764_{10000 + place}" for place in range(300)]
    table = SampleTable(Sample(sample_key(name), FileRef("/data", f"{name}.JPEG", None, 1), ("a",)) for name in names)
    table._pack()
    options = ScalingDataOptions(path_bytes=len(names[0]) + 5)
    assert table._text.size + table._samples.size == figures(300, options).table_bytes


def test_a_copy_is_limited_by_the_node_then_by_the_store() -> None:
    options = ScalingDataOptions(node_gbit=10, store_gbit=40)
    seconds = [staging_seconds(10e9, nodes, options) for nodes in (1, 4, 8)]
    assert seconds == pytest.approx([8, 8, 16])


def test_figures_grow_with_their_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("--images", "5000000000", "--shard-mb", "1000", "--nodes", "2", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "yours, 5,000,000,000" in printed
    shards = figures(5_000_000_000, ScalingDataOptions()).shards(1000)
    assert shards > MAPPED_TARS
    assert f"| {shards:,} | {shards:,} |" in printed


def test_the_plan_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("--measure", "3000", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith("3,000 images, CPU time: listing ")


@pytest.mark.parametrize(("option", "value"), [("--core-rate", "0"), ("--nodes", "-1"), ("--price-per-gb", "-1")])
def test_an_impossible_value_is_one_line(
    option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(option, value, monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert f"{option} must be" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("title", TABLES)
def test_the_documents_tables_are_the_printed_ones(title: str) -> None:
    formula, make = TABLES[title]
    assert make(ScalingDataOptions()) in DOCUMENT.read_text(), "print them anew: python benchmarks/scaling_data.py"
    assert formula in " ".join(DOCUMENT.read_text().split())

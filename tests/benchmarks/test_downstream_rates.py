"""Mode `downstream`: a protocol is trained by the user's command and its pipeline is measured; mistakes are named."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from downstream import run
from environment import BenchmarkError
from options import DownstreamRateOptions
from rich.console import Console

QUIET = Console(quiet=True)


def test_a_protocol_has_a_rate_a_memory_and_a_pipeline(tiny_shards: Path) -> None:
    console = Console(file=io.StringIO(), width=150)
    options = DownstreamRateOptions("demo", ("linear",), tiny_shards, device="cpu", batch_size=8, steps=4, seconds=0.1)
    row = run(options, console)["protocols"]["linear"]
    assert (row["trials"], row["images_per_pass"]) == (1, 8)
    assert 0 <= row["data_wait"] < 1
    assert min(row["images_per_second"], row["memory_gib"], row["pipeline"]["cpu"]) > 0
    assert list(row["pipeline"]) == ["cpu"]
    assert "linear" in console.file.getvalue()


def test_the_message_of_a_failed_command_is_passed_on(tiny_shards: Path) -> None:
    options = DownstreamRateOptions("demo", ("linear",), tiny_shards, label="absent", device="cpu", steps=2)
    with pytest.raises(BenchmarkError, match=r"--protocols linear: ended with code 1: .*absent"):
        run(options, QUIET)


@pytest.mark.parametrize("options", [DownstreamRateOptions(protocols=("liner",)), DownstreamRateOptions("no_such")])
def test_an_unknown_name_is_refused(options: DownstreamRateOptions) -> None:
    with pytest.raises(BenchmarkError, match="does not exist; choose from"):
        run(options, QUIET)

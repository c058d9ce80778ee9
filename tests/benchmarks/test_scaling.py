"""Weak scaling, measured with two real processes, and the summary of the times."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from environment import BenchmarkError
from options import ScalingOptions
from rich.console import Console
from scaling import Ways, run, summarised

from iwm.models.world_model import WorldModel
from iwm.recipes import demo
from tests.benchmarks.tile_shards import tile_shards
from tests.training.runs import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tile_shards(tmp_path_factory.mktemp("scaling"), ((8 * i, 4 * i, 8 * i + 100, 4 * i + 90) for i in range(24)))


def test_two_processes_measure_themselves_against_one(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    small = ["--encoder.depth", "1", "--predictor.depth", "1", "--images", "6"]
    quick = ["--seconds", "0.5", "--repeats", "1", "--warmup", "1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    mode = ["benchmarks/throughput.py", "scaling", "--shards", str(shards), "--json", str(file)]
    done = subprocess.run(
        [sys.executable, *launcher, *mode, *small, *quick],
        cwd=ROOT, capture_output=True, text=True, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 training one model") == 1, "only the first process prints"
    result = json.loads(file.read_text())
    assert (result["processes"], result["images_per_process"]) == (2, 6)
    base = demo()
    config = replace(base, encoder=replace(base.encoder, depth=1), predictor=replace(base.predictor, depth=1))
    sent = sum(p.numel() for p in WorldModel(config).parameters() if p.requires_grad)
    assert result["gradient_bytes"] == 4 * sent
    for way in ("alone", "beside", "together"):
        assert result["images_per_second"][way]["median"] > 0
    assert 0 < result["efficiency"]["lowest"] <= result["efficiency"]["highest"]
    assert result["all_reduce_ms"]["median"] > 0


def test_what_is_made_of_the_times() -> None:
    # Two turns of two processes, 10 images per step: alone 1 s; beside 1.25 s; together 1.5 s; all-reduce 0.5 s.
    first = Ways([1.0, 1.0], [1.25, 1.25], [1.5, 1.5], [0.5, 0.5])
    second = first._replace(alone=[float("nan")] * 2)
    result = summarised([first, second], images=10, sent=10**9)
    assert result["images_per_second"]["alone"]["median"] == 10
    assert result["images_per_second"]["together"]["median"] == pytest.approx(2 * 10 / 1.5, rel=1e-3)
    assert result["efficiency_without_communication"]["median"] == 0.8
    assert result["efficiency"]["median"] == pytest.approx(1 / 1.5, rel=1e-3)
    assert result["all_reduce_exposed_ms"]["median"] == pytest.approx(250)
    assert result["all_reduce_overlapped"]["median"] == pytest.approx(0.5)
    assert result["bus_bandwidth_gb"]["median"] == pytest.approx(2.0)


def test_one_process_is_told_how_to_start_more() -> None:
    with pytest.raises(BenchmarkError, match=r"torchrun --nproc_per_node 2 benchmarks/throughput\.py scaling"):
        run(ScalingOptions(demo(), recipe="demo"), Console(quiet=True))


def test_options_that_scaling_does_not_know_are_refused(tmp_path: Path) -> None:
    divided = replace(demo(), train=replace(demo().train, parallel="fsdp"))
    with pytest.raises(BenchmarkError, match=r"--train\.parallel fsdp: mode scaling supports only ddp"):
        run(ScalingOptions(divided, recipe="demo"), Console(quiet=True))
    with pytest.raises(BenchmarkError, match="--profile: mode scaling does not write traces"):
        run(ScalingOptions(demo(), recipe="demo", profile=tmp_path), Console(quiet=True))

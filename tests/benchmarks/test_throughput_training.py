"""Training modes of the benchmark on a tiny model and real shards: results, tables, plot and errors."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import throughput
import torch

from shards.command_line import run_command
from tests.training.runs import ROOT, TINY

MODEL = [word for key, value in TINY.items() if not key.startswith("log") for word in (f"--{key}", str(value))]
BRIEF = ("--seconds", "0.1", "--repeats", "2", "--warmup", "2")


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run benchmarks/throughput.py in this process."""
    monkeypatch.setattr(sys, "argv", ["throughput.py", *map(str, arguments)])
    return run_command(throughput.main, "benchmarks/throughput.py")


@pytest.fixture(scope="module")
def everything(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the output of mode `all`: all.json, all.svg and a trace."""
    out = tmp_path_factory.mktemp("all")
    files = ("--json", out / "all.json", "--plot", out / "all.svg", "--profile", out / "trace")
    with pytest.MonkeyPatch.context() as patch:
        line = ("all", "--recipe", "demo", "--shards", tiny_shards, *MODEL, *BRIEF, "--no-baselines", *files)
        assert run(patch, *line) == 0
    return out


def test_all_measures_every_mode_and_its_figures_agree_with_each_other(everything: Path) -> None:
    result = read(everything / "all.json")
    modes = result["modes"]
    assert list(modes) == ["data", "model", "interference", "end-to-end"]
    flops = sum(result["flops_per_image"].values())
    for name, mode in modes.items():
        assert mode["steps"] >= 2 * 5
        assert 0 < mode["step_ms"]["p10"] <= mode["step_ms"]["median"] <= mode["step_ms"]["p90"]
        assert 0 < min(mode["turns"]) <= max(mode["turns"])
        assert mode["images_per_second"]["median"] == pytest.approx(np.median(mode["turns"]), rel=1e-3)
        assert mode["memory_gib"] > 0.1
        if name == "data":
            assert mode["mfu"] is None
        else:
            attained = np.median(mode["turns"]) * flops
            assert mode["mfu"] == pytest.approx(attained / result["peak_flops"]["median"], rel=1e-3)
        # The number of all steps over their total time lies between the slowest and the fastest turn.
        assert min(mode["turns"]) * 0.999 <= 8 * mode["steps"] / mode["seconds"] <= max(mode["turns"]) * 1.001
    assert 0 < modes["end-to-end"]["data_wait"] < 1
    assert modes["model"]["data_wait"] == 0
    expected = [c / b for c, b in zip(modes["end-to-end"]["turns"], modes["model"]["turns"], strict=True)]
    assert result["ratios"]["end_to_end"]["median"] == pytest.approx(np.median(expected), rel=1e-3)
    assert result["bottleneck"].endswith(".")


def test_the_json_says_on_what_and_with_what_it_was_measured(everything: Path) -> None:
    result = read(everything / "all.json")
    assert result["mode"] == "all"
    assert result["recipe"] == "demo"
    assert result["settings"] == {"seconds": 0.1, "repeats": 2, "warmup": 2}
    assert result["config"]["data"]["global_batch_size"] == 8
    assert result["config"]["encoder"]["embed_dim"] == 32
    assert {"processor", "cores", "packages", "commit"} <= set(result["machine"])
    assert result["recompilations"] == 0
    assert 0 < result["warm_up"]["first_step_seconds"] < result["warm_up"]["seconds"]
    assert set(result["updates"]) == {"optimiser", "ema"}
    assert all(ms["median"] > 0 for ms in result["updates"].values())


def test_the_picture_shows_every_stage(everything: Path) -> None:
    picture = (everything / "all.svg").read_text()
    for stage in ("pipeline alone", "model alone", "model while the pipeline runs", "end to end", "images per second"):
        assert f"<!-- {stage}" in picture, stage


def test_the_profile_is_a_trace_and_the_ten_most_expensive_operators(everything: Path) -> None:
    with gzip.open(everything / "trace" / "trace-0.json.gz") as file:
        assert json.load(file)["traceEvents"]
    operators = read(everything / "all.json")["operators"]
    assert len(operators) == 10
    shares = [operator["share"] for operator in operators]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    assert any("mm" in operator["name"] for operator in operators)


@pytest.mark.parametrize("mode", ["model", "end-to-end", "interference"])
def test_a_mode_measures_what_it_is_named_for(
    mode: str, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    more = ("--baselines",) if mode == "model" else ()
    line = (mode, "--recipe", "demo", "--shards", tiny_shards, *MODEL, *BRIEF, "--repeats", 1, "--json", file, *more)
    assert run(monkeypatch, *line) == 0
    modes = read(file)["modes"]
    printed = capsys.readouterr().out
    assert mode in modes
    assert all(name in printed and entry["mfu"] > 0 for name, entry in modes.items())
    if mode == "model":
        # I-JEPA's step truncates and predicts block by block, so its MFU is based on other FLOPs.
        assert len(modes) == 3
        assert len({entry["flops_per_image"] for entry in modes.values()}) == 2


@pytest.mark.long
def test_under_torchrun_the_first_process_reports_the_images_of_all(tiny_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.json"
    options = ["end-to-end", "--recipe", "demo", "--shards", tiny_shards, *MODEL, *BRIEF, "--json", file]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, ROOT / "benchmarks" / "throughput.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps measured") == done.stdout.count("turn 2 of 2") == 1
    result = read(file)
    assert result["processes"] == 2
    assert len(result["modes"]["end-to-end"]["turns"]) == 2


@pytest.mark.long
def test_all_sets_the_pipeline_beside_its_limit_its_rivals_and_its_own_parts(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--json", tmp_path / "all.json", "--plot", tmp_path / "all.png")
    assert run(monkeypatch, "all", "--recipe", "demo", "--shards", tiny_shards, *MODEL, *BRIEF, *files) == 0
    result = read(tmp_path / "all.json")
    limits = result["pipeline_limits"]
    assert set(limits) == {"torchvision pil", "torchvision tensor", "JPEG decode alone"}
    assert all(limit["core"]["median"] > 0 for limit in limits.values())
    assert {"read", "decode", "crop and resize"} < set(result["pipeline_stages"])
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (("all", "--recipe", "cake"), "--recipe cake: does not exist; choose from demo"),
        (("model", "--scenario", "purple"), "--scenario purple: does not exist; choose from default"),
        (("all", "--plot", "picture.bmp"), "--plot picture.bmp: the name must end in .png or .svg"),
        (("model", "--repeats", "0"), "--repeats 0: must be at least 1"),
        (("model", "--seconds", "0"), "--seconds 0.0: must be above 0"),
        (
            ("end-to-end", "--recipe", "demo", "--views.size", "33"),
            "views.size 33 is not a multiple of encoder.patch_size 8",
        ),
        (
            ("model", "--data.global-batch-size", "101"),
            "--data.global-batch-size 101: .* has only 100 images in 'train'",
        ),
        (("model", "--json", "/dev/null/result.json"), "--json /dev/null/result.json: its folder cannot be created"),
        pytest.param(
            ("model", "--train.device", "cuda"),
            "train.device cuda: torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="no mistake where there is a GPU"),
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(
    mistake: tuple[str, ...],
    message: str,
    tiny_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *mistake, "--shards", tiny_shards) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("benchmarks/throughput.py: ")
    assert re.search(message, errors[0]), errors[0]

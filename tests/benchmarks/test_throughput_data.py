"""Data benchmark, run as by a user, and the work of its baseline."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines.torchvision_loader import TwoViews, Variant
from environment import BenchmarkError
from loaders import fastest, over_each, run
from options import LoaderOptions
from rich.console import Console
from timing import Rate

from dali_pipelines.augmentations import NO_PHOTOMETRIC, PhotometricConfig
from dali_pipelines.views import Views
from iwm.config import ConfigError
from tests.benchmarks.tile_shards import tile_shards

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    boxes = ((8 * i, 4 * i, 8 * i + 200, 4 * i + 150) for i in range(24))
    return tile_shards(tmp_path_factory.mktemp("benchmark"), boxes)


def throughput(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "throughput.py", "data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_a_measurement_compares_on_equal_terms_and_says_on_what(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    quick = ("--size", 32, "--batch-size", 8, "--seconds", 0.5, "--repeats", 1)
    done = throughput("--shards", shards, *quick, "--json", file)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["views"]["size"] == 32
    assert set(result["images_per_second"]["wall"]) == {"dali", "torchvision pil", "torchvision tensor"}
    for clock in ("wall", "core"):
        rates = result["images_per_second"][clock]
        assert all(rate["p10"] <= rate["median"] <= rate["p90"] for rate in rates.values())
        opponent = max(("torchvision pil", "torchvision tensor"), key=lambda name: rates[name]["median"])
        expected = rates["dali"]["median"] / rates[opponent]["median"]
        assert result["fastest_rival"][clock] == opponent
        assert result["dali_over"][clock][opponent]["median"] == pytest.approx(expected, rel=0.01)
    assert {"processor", "cores", "packages", "commit"} <= set(result["machine"])


def test_a_users_mistake_is_one_line_and_no_traceback(shards: Path) -> None:
    done = throughput("--shards", shards, "--batch-size", 25)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search("--batch-size 25: .* has only 24 images", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"scenario": "purple"}, "--scenario purple: does not exist; choose from default"),
        ({"recipe": "cake"}, "--recipe cake: does not exist; choose from demo"),
        ({"cores": 9999}, "--cores 9999: this process may use"),
    ],
)
def test_other_mistakes_name_the_option_and_what_there_is(shards: Path, mistake: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        run(LoaderOptions(shards=shards, batch_size=8, **mistake), Console())


def test_a_backend_that_needs_a_gpu_is_refused_beside_none(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"--backend triton: it needs a GPU.*use --backend cpu"):
        run(LoaderOptions(shards=shards, batch_size=8, backend="triton"), Console())


def test_the_ratio_is_over_the_faster_baseline_turn_by_turn() -> None:
    turns = {
        "dali": [[Rate(200, 300)], [Rate(100, 300)]],
        "torchvision pil": [[Rate(100, 100)], [Rate(50, 100)]],
        "torchvision tensor": [[Rate(50, 200)], [Rate(50, 100)]],
    }
    rivals = ["torchvision pil", "torchvision tensor"]
    assert fastest(turns, rivals, "wall") == "torchvision pil"
    assert over_each(turns, "wall")["torchvision pil"] == {"median": 2.0, "lowest": 2.0, "highest": 2.0}
    assert fastest(turns, rivals, "core") == "torchvision tensor"
    assert over_each(turns, "core")["torchvision tensor"] == {"median": 2.25, "lowest": 1.5, "highest": 3.0}


@pytest.mark.parametrize("variant", ["pil", "tensor"])
def test_the_baseline_does_the_same_work(shards: Path, variant: Variant) -> None:
    torch.manual_seed(0)
    always = PhotometricConfig(1.0, 0.4, 0.4, 0.2, 0.1, 1.0, 1.0, (0.1, 2.0), 1.0)
    source, target = TwoViews(shards, "train", Views(size=48, source=always, target=NO_PHOTOMETRIC), variant)[3]
    assert source.shape == target.shape == (3, 48, 48)
    assert source.dtype == target.dtype == torch.uint8
    assert (source[0] == source[1]).all()
    assert not (target[0] == target[1]).all()

"""Linear accuracy from features on a disk: what an interruption costs, what is used again, how much memory it takes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from iwm.config import Config, ConfigError
from iwm.evaluation import linear_accuracy as module
from iwm.evaluation.common import load_eval_context
from iwm.evaluation.feature_store import FeatureStore, WrittenPart
from iwm.evaluation.linear_accuracy import PooledFeatures, linear_accuracy
from iwm.evaluation.settings import EvalSettings, LinearSettings
from tests.evaluation.conftest import untrained

ALL = LinearSettings(train_images=None, val_images=None, l2=(0.1, 1.0))


class Counted:
    """Two kinds of features, one with a random number per image; counts the images, and dies before some."""

    def __init__(self, die_after: int | None = None) -> None:
        self.images, self.die_after = 0, die_after
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, images: Tensor) -> Tensor:
        if self.die_after is not None and self.images >= self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.images += len(images)
        pixels = images.float().mean((1, 2))
        noise = torch.rand(len(images), 3, generator=self.generator)
        return torch.stack([pixels, pixels + 20 * noise], dim=1)


def measure(
    run: Path, folder: Path, counted: Counted, settings: LinearSettings = ALL, identity: dict[str, Any] | None = None
) -> dict[str, Any]:
    module.SAVE_EVERY = 64  # a batch; the tests' split has two
    context = load_eval_context(EvalSettings(checkpoint=run, device="cpu"))
    kinds = PooledFeatures(("plain", "noisy"), counted, counted.generator, identity or {})
    return linear_accuracy(context, settings, kinds, 0, folder)


def measure_and_die(run: Path, folder: Path) -> None:
    measure(run, folder, Counted(die_after=64))


@pytest.fixture
def run(tiny_shards: Path, config: Config, tmp_path: Path) -> Path:
    return untrained(tmp_path / "run", replace(config, data=replace(config.data, shards=str(tiny_shards))))


def test_after_a_kill_the_same_command_continues_to_the_same_result(run: Path, tmp_path: Path) -> None:
    whole = measure(run, tmp_path / "whole", Counted())
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=measure_and_die, args=(run, tmp_path / "features"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # The bytes of a batch that was written and not recorded.
    with (tmp_path / "features" / "train" / "noisy.f32").open("ab") as file:
        file.write(b"rest")
    rest = Counted()
    assert measure(run, tmp_path / "features", rest) == whole
    assert rest.images == 36 + 24
    assert not (tmp_path / "features").exists()


def test_kept_features_are_used_by_what_they_are_of_and_by_nothing_else(run: Path, tmp_path: Path) -> None:
    class Asked(NamedTuple):
        settings: LinearSettings = replace(ALL, keep_features=True)
        identity: dict[str, Any] | None = None

    def computed(asked: Asked) -> int:
        counted = Counted()
        measure(run, tmp_path / "features", counted, asked.settings, asked.identity)
        return counted.images

    kept = Asked()
    assert [computed(kept), computed(kept)] == [124, 0]
    assert computed(kept._replace(settings=replace(kept.settings, l2=(0.5,)))) == 0
    assert computed(kept._replace(identity={"jitter": (1, 2)})) == 124
    assert computed(kept._replace(identity={"jitter": (1, 2)})) == 0
    assert computed(kept._replace(settings=replace(kept.settings, train_images=50))) == 50 + 24
    os.truncate(tmp_path / "features" / "val" / "plain.f32", 8)
    assert computed(kept._replace(settings=replace(kept.settings, train_images=50))) == 24


def test_scratch_is_another_folder_with_the_name_of_the_run(run: Path, tmp_path: Path) -> None:
    settings = replace(ALL, scratch=tmp_path / "scratch", keep_features=True)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "of others").touch()
    measure(run, tmp_path / "features", Counted(), settings)
    assert {path.name for path in (tmp_path / "scratch").iterdir()} == {"of others", "run-features"}
    assert not (tmp_path / "features").exists()


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features", ("a", "b"), 10**12, {})
    with pytest.raises(
        ConfigError, match=r"the features of 1,000,000,000,000 images need 6152000.0 GB more, .*--scratch"
    ):
        store.require_space(768, "--scratch")


@pytest.mark.parametrize("memory", [0, 100, 10**6])
def test_chunks_are_the_rows_in_their_order_whatever_stays_in_memory(tmp_path: Path, memory: int) -> None:
    rows = torch.randn(23, 2, 5)
    store = FeatureStore(tmp_path, ("a", "b"), 23, {})
    for part, labels in zip(rows.split(4), torch.arange(23).split(4), strict=True):
        store.append(part, labels)
    store.save(WrittenPart(23, 5))
    chunks = store.chunks("b", torch.device("cpu"), memory, rows=3)
    for _ in range(2):
        assert torch.equal(torch.cat(list(chunks)), rows[:, 1])
    assert store.labels().tolist() == list(range(23))
    shutil.rmtree(tmp_path)


PEAK = """
import resource, sys
from pathlib import Path
import torch
from iwm.evaluation.feature_store import FeatureStore, WrittenPart
from iwm.evaluation.logistic_regression import Samples, fit_with_validation

images, folder = int(sys.argv[1]), Path(sys.argv[2])
store = FeatureStore(folder, ("a",), images, {})
generator = torch.Generator().manual_seed(0)
for _ in range(images // 1000):
    labels = torch.randint(0, 4, (1000,), generator=generator)
    rows = torch.randn(1000, 1, 256, generator=generator)
    rows[:, 0, :4] += torch.nn.functional.one_hot(labels, 4)
    store.append(rows, labels)
store.save(WrittenPart(images, 256))
samples = Samples(store.chunks("a", torch.device("cpu"), 0, rows=2000), store.labels())
assert fit_with_validation(samples, 4, (0.1,)).accuracy(samples) > 0.4
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_ten_times_the_images_take_no_more_memory(tmp_path: Path) -> None:
    """80,000 rows would be 82 MB in float32, and more than twice that while they are fitted in float64."""

    def peak(images: int) -> int:
        command = [sys.executable, "-c", PEAK, str(images), str(tmp_path / str(images))]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    few, many = peak(8_000), peak(80_000)
    assert many - few < 30, f"{few} MB with 8,000 images, {many} MB with 80,000"

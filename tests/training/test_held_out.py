"""Training on a user's own images, without labels, with and without held-out images."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from iwm.ablate import main as ablate
from iwm.training.checkpoint import checkpoint_path
from shards.errors import UserError
from shards.make import ShardingOptions, make_shards
from tests.training.runs import arguments, command, finish, metrics, tiny_config, train_here

UNWATCHED = "MRR, feature_std and RankMe are not measured"


@pytest.fixture(scope="module")
def photos(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images in one flat folder."""
    folder = tmp_path_factory.mktemp("photos")
    for path in sorted((tiny_shards.parent / "train").rglob("*.jpg")):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def unwatched(photos: Path) -> Path:
    """Shards of these images, with the split 'train' alone."""
    out = photos.with_name("shards-without-val")
    make_shards(ShardingOptions(str(photos), out, workers=1), Console(quiet=True))
    return out


def test_one_command_makes_shards_to_train_on_and_to_evaluate(photos: Path, tmp_path: Path) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    finish([sys.executable, "tools/make_shards.py", str(photos), str(shards), "--val-fraction", "0.1"])
    output = finish(command(shards, run, 10, "--log.eval-interval", "5"))
    assert UNWATCHED not in output
    assert output.count("training images are few: the paper has 1,281,167") == 1
    assert [line["step"] for line in metrics(run) if "mrr_pooled" in line] == [5, 10]
    bank = ["--bank.num-images", "2", "--bank.num-views", "8"]
    finish([sys.executable, "iwm/evaluate.py", "mrr", "--checkpoint", str(run), *bank])
    assert json.loads((run / "eval" / "mrr.json").read_bytes())["images"] == 2


def test_without_the_default_split_nothing_is_watched_and_one_line_says_so(
    unwatched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(unwatched, 10)
    train_here(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count(UNWATCHED) == 1
    assert "--val-fraction" in said
    assert "--data.val" in said
    assert not any("mrr_pooled" in line for line in metrics(tmp_path / "run"))
    train_here(replace(config, data=replace(config.data, val=None)), tmp_path / "wanted")
    assert UNWATCHED not in capsys.readouterr().out


def test_several_processes_train_without_held_out_images(unwatched: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = finish(command(unwatched, run, 10, "--train.parallel", "fsdp", processes=2))
    assert output.count(UNWATCHED) == 1
    assert checkpoint_path(run, 10).exists()
    assert not any("mrr_pooled" in line for line in metrics(run))


def test_a_run_is_watched_from_where_a_split_is_named(
    unwatched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(unwatched, 20)
    train_here(config, tmp_path / "run")
    checkpoint_path(tmp_path / "run", 20).unlink()
    train_here(replace(config, data=replace(config.data, val="train")), tmp_path / "run")
    said = capsys.readouterr().out
    assert "data.val: val → train" in said
    assert said.count(UNWATCHED) == 1
    assert [line["step"] for line in metrics(tmp_path / "run") if "mrr_pooled" in line] == [20]


@pytest.mark.parametrize("val", [[], ["--data.val", "None"], ["--data.val", "test"]])
def test_a_study_needs_held_out_images_before_it_trains(
    unwatched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val: list[str]
) -> None:
    training = [*arguments(unwatched, tmp_path / "unused", 10)[3:], *val]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["iwm/ablate.py", "conditioning", "demo", "--", *training])
    with pytest.raises(UserError, match=r"--data\.val (val|None|test): ") as error:
        ablate()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())

"""Command line of iwm/train.py: recipe, scenario and single fields; one-line errors."""

import sys
from pathlib import Path

import pytest
import torch

from dali_pipelines.augmentations import SCENARIOS
from iwm import recipes, train
from iwm.recipes import RECIPES
from shards.errors import run_command


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["iwm/train.py", *arguments])
    return run_command(train.main, "iwm/train.py")


def test_fields_override_the_scenario_and_the_scenario_the_recipe() -> None:
    command = recipes.parse(["iwm_b16_equi_18x384", "--scenario", "strong", "--views.source.hue", "0.3"])
    assert command.run_dir == Path("runs/iwm_b16_equi_18x384-strong")
    assert command.config.views.source.brightness == SCENARIOS["strong"].source.brightness
    assert command.config.views.source.hue == 0.3
    assert command.config.predictor.depth == 18
    plain = recipes.parse(["demo"])
    assert plain.config == RECIPES["demo"]()
    assert plain.run_dir == Path("runs/demo")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no_such_recipe"], "no_such_recipe"),
        (["demo", "--optim.momentum", "0.9"], "--optim.momentum"),
        (["demo", "--scenario", "sepia"], "sepia"),
        (["demo", "--data.global-batch-size", "many"], "many"),
    ],
)
def test_unknown_names_are_refused(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        recipes.parse(arguments)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.shards", "nowhere"], "nowhere/manifest.json does not exist"),
        (["--views.size", "30"], "views.size 30 is not a multiple of encoder.patch_size 8"),
        pytest.param(
            ["--train.device", "cuda"],
            "train.device cuda: torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="no mistake where there is a GPU"),
        ),
        (["--optim.implementation", "apex", "--train.device", "cpu"], "optim.implementation apex"),
        (["--data.backend", "gpu", "--train.device", "cpu"], "data.backend gpu: it needs a GPU"),
        (["--data.val", "test"], "no split 'test'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_1(
    arguments: list[str],
    message: str,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = ["--data.shards", str(tiny_shards), "--data.global-batch-size", "8"]
    assert run_main(monkeypatch, "demo", "--run-dir", str(tmp_path / "run"), *shards, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("iwm/train.py: ")
    assert len(error.strip().splitlines()) == 1

"""Command line of iwm/train.py: recipe, scenario and single fields; one-line errors."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dali_pipelines.views import SCENARIOS
from iwm import train
from iwm.config import Config, ConfigError
from iwm.config_io import to_yaml
from iwm.model_config import PredictorConfig
from iwm.recipes import RECIPES
from iwm.train_options import parse
from shards.command_line import run_command
from shards.errors import UserError


def run_main(*arguments: str) -> int:
    return run_command(partial(train.main, arguments), "iwm/train.py")


def test_fields_override_the_scenario_and_the_scenario_the_recipe() -> None:
    command = parse(["iwm_b16_equi_18x384", "--scenario", "strong", "--views.source.hue", "0.3"])
    assert command.run_dir == Path("runs/iwm_b16_equi_18x384-strong")
    assert command.config.views.source.brightness == SCENARIOS["strong"].source.brightness
    assert command.config.views.source.hue == 0.3
    assert command.config.predictor.depth == 18
    plain = parse(["demo"])
    assert plain.config == RECIPES["demo"]()
    assert plain.run_dir == Path("runs/demo")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["demo", "--optim.momentum", "0.9"], "--optim.momentum"),
        (["demo", "--data.global-batch-size", "many"], "many"),
    ],
)
def test_an_invalid_option_is_answered_for_the_chosen_recipe(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert "iwm/train.py demo --help" in error
    assert not any(name in error for name in RECIPES if name != "demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demoo"], "no recipe 'demoo'; did you mean 'demo'?"),
        (["demo", "--scenario", "sepia"], "--scenario sepia: no such scenario; choose one of default, "),
        (["demo", "--config", "x.yaml"], "demo --config x.yaml: the file replaces a recipe"),
        (["--config", "x.yaml"], "--config x.yaml: No such file or directory; give a run's config.yaml"),
    ],
)
def test_an_unknown_name_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        parse(arguments)


def test_without_a_recipe_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)


def test_a_runs_config_replaces_the_recipe_and_fields_override_it(tmp_path: Path) -> None:
    file = tmp_path / "photos" / "config.yaml"
    file.parent.mkdir()
    written = parse(["cpu_small", "--predictor.depth", "3"]).config
    file.write_text(to_yaml(written))
    again = parse(["--config", str(file)])
    assert again.config == written
    assert again.run_dir == Path("runs/photos")
    assert parse([f"--config={file}", "--optim.lr", "0.5"]).config.optim.lr == 0.5
    strong = parse(["--config", str(file), "--scenario", "strong"])
    assert strong.config.views.source.hue == SCENARIOS["strong"].source.hue
    assert strong.run_dir == Path("runs/photos-strong")


def test_a_file_of_a_few_fields_keeps_the_papers_values(tmp_path: Path) -> None:
    file = tmp_path / "deep.yaml"
    file.write_text("predictor:\n  depth: 24\n")
    command = parse(["--config", str(file)])
    assert command.config == replace(Config(), predictor=PredictorConfig(depth=24))
    assert command.run_dir == Path("runs/deep")


@pytest.mark.parametrize(
    "text", ["predictor:\n  dephts: 24\n", "- 1\n", "a: [", "predictor:\n  depth: many\n", "predictor: 3\n", ""]
)
def test_a_file_that_is_no_configuration_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml: not a configuration"):
        parse(["--config", str(file)])


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
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = ["--data.shards", str(tiny_shards), "--data.global-batch-size", "8"]
    assert run_main("demo", "--run-dir", str(tmp_path / "run"), *shards, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("iwm/train.py: ")
    assert len(error.strip().splitlines()) == 1

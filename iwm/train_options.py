"""Options of iwm/train.py: a recipe or a configuration file, then a scenario and single fields over it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
import yaml

from dali_pipelines.views import SCENARIOS
from iwm.config import Config, ConfigError
from iwm.config_io import from_yaml
from iwm.ranges import Range
from iwm.recipes import RECIPES, with_scenario
from shards.command_line import Subcommand, parse_subcommand

RUNS = Path("runs")
"""Folder of all runs."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of iwm/train.py."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run_dir: Path
    """Folder of the run, for checkpoints, metrics.jsonl, config.yaml and TensorBoard files.
    The default is runs/RECIPE[-SCENARIO]."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(SCENARIOS))] = None
    """Row of table S2 that replaces the recipe's photometric augmentations. --views.* then overrides single fields.
    Recipes have those of A.1, which are `default` but for solarize: its probability is 0.2, in the table 0.1."""
    stop_status: Annotated[int, Range(min=0, max=255)] = 0
    """Exit status after a stop by a signal, before the last step. A batch script requeues the job for it (slurm/).
    torchrun itself exits with 1 after a signal, whatever this is."""


def parse(arguments: Sequence[str], description: str | None = None, prog: str = "iwm/train.py") -> TrainOptions:
    """Parse the arguments of iwm/train.py: `RECIPE` or `--config FILE`, then a scenario and single fields.

    Raises ConfigError for an unknown recipe or scenario, and for a file that is not a configuration; SystemExit for
    invalid options.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--scenario")
    first.add_argument("--config", type=Path)
    chosen, words = first.parse_known_args(arguments)
    if chosen.scenario is not None:
        if chosen.scenario not in SCENARIOS:
            raise ConfigError(f"--scenario {chosen.scenario}: no such scenario; choose one of {', '.join(SCENARIOS)}")
        words += ["--scenario", chosen.scenario]
    if chosen.config is None:
        recipes = {
            name: Subcommand(TrainOptions, _defaults(recipe(), name, chosen.scenario), recipe.__doc__)
            for name, recipe in RECIPES.items()
        }
        return parse_subcommand(recipes, words, prog=prog, description=description, noun="recipe")[1]
    if words[:1] and words[0] in RECIPES:
        raise ConfigError(f"{words[0]} --config {chosen.config}: the file replaces a recipe; use one of the two")
    return tyro.cli(
        TrainOptions,
        default=_defaults(load_config(chosen.config), _run_name(chosen.config), chosen.scenario),
        args=words,
        prog=f"{prog} --config {chosen.config}",
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _defaults(config: Config, name: str, scenario: str | None) -> TrainOptions:
    if scenario is None:
        return TrainOptions(config, RUNS / name)
    return TrainOptions(with_scenario(config, scenario), RUNS / f"{name}-{scenario}", scenario)


def load_config(file: Path) -> Config:
    """Read a configuration, such as a run's config.yaml; absent fields have the paper's values (iwm/config.py).

    Raises ConfigError, which names the file, for a missing file and for unknown or invalid fields.
    """
    try:
        return from_yaml(file.read_text())
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}; give a run's config.yaml") from error
    except (ConfigError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: not a configuration ({error}); compare it with a run's") from error


def _run_name(file: Path) -> str:
    """Return the name of the run folder for a configuration file; config.yaml is named after its folder."""
    return file.resolve().parent.name if file.name == "config.yaml" else file.stem

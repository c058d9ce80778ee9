"""Pretrain an Image World Model: torchrun iwm/train.py RECIPE [--scenario NAME] [--run-dir DIR] [--SECTION.FIELD ...]

The same command, given again, goes on from the newest checkpoint in its run's folder.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dali_pipelines.augmentation import SCENARIOS
from dali_pipelines.loader import StateError
from iwm.config import Config, ConfigError
from iwm.recipes import RECIPES, with_scenario
from iwm.training.checkpoint import CheckpointError
from iwm.training.distributed import world
from iwm.training.loop import TrainingError, pretrain
from iwm.training.resume import locked
from iwm.training.session import open_session
from iwm.training.signals import stop_on_signal
from shards.manifest import ShardError


@dataclass(frozen=True)
class Command:
    config: Annotated[Config, tyro.conf.arg(name="")]
    run_dir: Path
    """Folder of the run: checkpoints, metrics.jsonl, config.yaml, tensorboard. Default: runs/RECIPE[-SCENARIO]."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(SCENARIOS))] = None
    """Row of table S2 whose colours replace the recipe's; --views.* then overrides single fields of it."""


def parse(arguments: list[str]) -> Command:
    """The recipe (a function of iwm/recipes.py), then the scenario, then single fields, each over the one before."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--scenario", choices=SCENARIOS)
    scenario = first.parse_known_args(arguments)[0].scenario
    choices = {}
    for name, recipe in RECIPES.items():
        config = with_scenario(recipe(), scenario) if scenario else recipe()
        run = Path("runs") / (f"{name}-{scenario}" if scenario else name)
        choices[name] = ((recipe.__doc__ or "").strip(), Command(config, run, scenario))
    return tyro.extras.overridable_config_cli(choices, args=arguments, description=__doc__, prog="iwm/train.py")


def main() -> int:
    command = parse(sys.argv[1:])
    try:
        command.config.check()
        with world(command.config.train) as here, stop_on_signal() as wish:
            if here.main:
                with locked(command.run_dir):
                    pretrain(open_session(command.config, command.run_dir, here), wish)
            else:
                pretrain(open_session(command.config, command.run_dir, here), wish)
    except (ConfigError, ShardError, StateError, CheckpointError, TrainingError) as error:
        print(f"iwm/train.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

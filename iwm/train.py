"""Pretrain an Image World Model: torchrun iwm/train.py RECIPE [--scenario NAME] [--run-dir DIR] [--SECTION.FIELD ...]

The same command, given again, goes on from the newest checkpoint in its run's folder.
"""

from __future__ import annotations

import dali_pipelines.command  # noqa: F401  # isort: skip  # first: it ends the command where DALI is missing

import argparse
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dali_pipelines.augmentation import SCENARIOS
from dali_pipelines.endless import StateError
from iwm.config import Config, ConfigError
from iwm.recipes import RECIPES, with_scenario
from iwm.training.checkpoint import CheckpointError
from iwm.training.distributed import world
from iwm.training.loop import TrainingError, pretrain
from iwm.training.resume import locked
from iwm.training.session import open_session
from iwm.training.signals import stop_on_signal
from iwm.training.tuned import read_tuned, this_machine
from shards.manifest import ShardError


@dataclass(frozen=True)
class Command:
    config: Annotated[Config, tyro.conf.arg(name="")]
    run_dir: Path
    """Folder of the run: checkpoints, metrics.jsonl, config.yaml, tensorboard. Default: runs/RECIPE[-SCENARIO]."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(SCENARIOS))] = None
    """Row of table S2 whose colours replace the recipe's; --views.* then overrides single fields of it."""
    tuned: Path | None = None
    """File of `benchmarks/throughput.py tune`, whose settings replace the recipe's; --data.* then overrides them."""


def parse(arguments: list[str]) -> Command:
    """The recipe (a function of iwm/recipes.py), then scenario and tuned file, then single fields, each over the last.

    Raises ConfigError where the tuned file is not one.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--scenario", choices=SCENARIOS)
    first.add_argument("--tuned", type=Path)
    given = first.parse_known_args(arguments)[0]
    tuned = read_tuned(given.tuned) if given.tuned else None
    choices = {}
    for name, recipe in RECIPES.items():
        config = with_scenario(recipe(), given.scenario) if given.scenario else recipe()
        config = tuned.over(config) if tuned else config
        run = Path("runs") / (f"{name}-{given.scenario}" if given.scenario else name)
        choices[name] = ((recipe.__doc__ or "").strip(), Command(config, run, given.scenario, given.tuned))
    return tyro.extras.overridable_config_cli(choices, args=arguments, description=__doc__, prog="iwm/train.py")


def main() -> int:
    try:
        command = parse(sys.argv[1:])
        command.config.check()
        with (
            world(command.config.train) as here,
            stop_on_signal() as wish,
            locked(command.run_dir) if here.main else nullcontext(),
        ):
            session = open_session(command.config, command.run_dir, here)
            if command.tuned:
                session.opening += read_tuned(command.tuned).remarks(this_machine(here.device, here.local_size))
            pretrain(session, wish)
    except (ConfigError, ShardError, StateError, CheckpointError, TrainingError) as error:
        print(f"iwm/train.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

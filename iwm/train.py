"""Pretrain an Image World Model: torchrun iwm/train.py RECIPE [--scenario NAME] [--run-dir DIR] [--SECTION.FIELD ...]

Rerun the same command to resume from the newest checkpoint in the run's folder.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dali_pipelines.augmentations import SCENARIOS
from iwm.config import Config
from iwm.recipes import RECIPES, with_scenario
from shards.errors import run_command


@dataclass(frozen=True)
class TrainOptions:
    """Options of the command."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run_dir: Path
    """Folder of the run, for checkpoints, metrics.jsonl, config.yaml and TensorBoard files.
    The default is runs/RECIPE[-SCENARIO]."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(SCENARIOS))] = None
    """Row of table S2 that replaces the recipe's colour augmentations. --views.* then overrides single fields."""


def parse(arguments: list[str]) -> TrainOptions:
    """Parse the command line: a recipe (a function of iwm/recipes.py), then a scenario and single fields over it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--scenario", choices=SCENARIOS)
    scenario = first.parse_known_args(arguments)[0].scenario
    choices = {}
    for name, recipe in RECIPES.items():
        config = with_scenario(recipe(), scenario) if scenario else recipe()
        run = Path("runs") / (f"{name}-{scenario}" if scenario else name)
        choices[name] = ((recipe.__doc__ or "").strip(), TrainOptions(config, run, scenario))
    return tyro.extras.overridable_config_cli(choices, args=arguments, description=__doc__, prog="iwm/train.py")


def main() -> None:
    command = parse(sys.argv[1:])
    command.config.check()
    # Imported late: torch and DALI take seconds to import, and a mistyped option must fail at once.
    from iwm.evaluation.health import health_check
    from iwm.training.distributed import init_distributed
    from iwm.training.loop import pretrain
    from iwm.training.runtime import stop_on_signal
    from iwm.training.train_state import build_train_state, run_lock

    with (
        init_distributed(command.config.train) as dist,
        stop_on_signal() as stop,
        run_lock(command.run_dir) if dist.is_main else nullcontext(),
    ):
        state = build_train_state(command.config, command.run_dir, dist)
        pretrain(state, stop, health_check(command.config, dist))


if __name__ == "__main__":
    sys.exit(run_command(main, "iwm/train.py"))

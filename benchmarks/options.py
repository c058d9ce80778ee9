"""Options of the modes that run training steps: all fields of a recipe, and the measurement's length."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import tyro
from environment import BenchmarkError, lookup
from rich.console import Console
from synthetic_data import GENERATED, generated_shards

from dali_pipelines.augmentations import SCENARIOS
from iwm.config import Config
from iwm.ranges import Range, check_ranges
from iwm.recipes import RECIPES, with_scenario
from iwm.training.distributed import DistEnv
from shards.format import load_manifest

BATCH_EACH = 256
"""Default maximum batch size per process (images): an eighth of the paper recipes' 2,048."""


@dataclass(frozen=True)
class StepOptions:
    """Options of the modes that run training steps."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: Annotated[str, tyro.conf.arg(metavar="|".join(RECIPES))]
    """Recipe. Default: iwm_b16_equi_18x384 on a GPU, else demo, with at most 256 images per step on each process."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(SCENARIOS))] = None
    """Row of table S2 that replaces the recipe's colour augmentations."""
    shards: Path | None = None
    """Folder of shards (short for --data.shards). None: generate shards in data/benchmark.
    These have 1,200 JPEGs of 500×375, cut from scikit-image's photographs."""
    seconds: Annotated[float, Range(above=0)] = 60.0
    """Measured time of each mode over all turns (seconds), with at least five steps per turn.
    The default is 60 on a GPU, else 6."""
    repeats: Annotated[int, Range(min=1)] = 3
    """Number of turns. Each turn measures every mode once."""
    warmup: Annotated[int, Range(min=1)] = 30
    """Number of steps before the measurements. The first one includes compilation."""
    json: Path | None = None
    """File for all results (JSON)."""
    profile: Path | None = None
    """Folder for a torch profiler trace of a few steps, readable by Chrome and Perfetto."""

    def check(self) -> None:
        """Raise ConfigError for invalid options."""
        self.config.check()
        check_ranges(self)

    def prepare(self, dist: DistEnv, console: Console) -> None:
        """Generate the default shards if they are used. All processes must call this first.

        Raises BenchmarkError where the shards have fewer images than one step needs.
        """
        data = self.config.data
        if dist.is_main and data.shards == GENERATED / "shards":
            generated_shards(console)
        dist.gather("shards generated")
        samples = load_manifest(data.shards, data.train).samples
        if samples < data.global_batch_size:
            raise BenchmarkError(
                f"--data.global-batch-size {data.global_batch_size}: "
                f"{data.shards} has only {samples} images in '{data.train}'; choose at most {samples}"
            )


StepOptionsT = TypeVar("StepOptionsT", bound=StepOptions)


def default_options(kind: type[StepOptionsT], arguments: Sequence[str]) -> StepOptionsT:
    """Return a mode's default options for the given recipe, scenario and shards; other arguments override fields later.

    Raises BenchmarkError where the recipe or scenario does not exist.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="iwm_b16_equi_18x384" if torch.cuda.is_available() else "demo")
    first.add_argument("--scenario")
    first.add_argument("--shards", type=Path)
    chosen = first.parse_known_args(arguments)[0]
    config = lookup("--recipe", chosen.recipe, RECIPES)()
    if chosen.scenario is not None:
        lookup("--scenario", chosen.scenario, SCENARIOS)
        config = with_scenario(config, chosen.scenario)
    most = BATCH_EACH * int(os.environ.get("WORLD_SIZE", 1))
    data = replace(
        config.data,
        shards=chosen.shards or GENERATED / "shards",
        global_batch_size=min(config.data.global_batch_size, most),
        val=None,
    )
    return kind(
        replace(config, data=data),
        recipe=chosen.recipe,
        scenario=chosen.scenario,
        shards=chosen.shards,
        seconds=60.0 if torch.cuda.is_available() else 6.0,
    )

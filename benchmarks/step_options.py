"""What the modes that take training steps can be told: any field of any recipe, and how long to look."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import tyro
from generated import GENERATED, generated_shards
from mistakes import BenchmarkError, named
from rich.console import Console

from dali_pipelines.augmentation import SCENARIOS
from iwm.config import Config
from iwm.recipes import RECIPES, with_scenario
from iwm.training.distributed import World
from iwm.training.tuned import read_tuned, this_machine
from shards.manifest import load_manifest

BATCH_EACH = 256
"""Most images of a step on one process, where the user says no other: an eighth of the paper recipes' 2,048."""


@dataclass(frozen=True)
class StepOptions:
    """Options of every mode that trains."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: Annotated[str, tyro.conf.arg(metavar="|".join(RECIPES))]
    """Default: iwm_b16_equi_18x384 where there is a GPU, else demo; of at most 256 images a step on each process."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(SCENARIOS))] = None
    """Row of table S2 in place of the recipe's colours."""
    shards: Path | None = None
    """Folder of shards (short for --data.shards); None: 1,200 JPEGs of 500×375 cut from scikit-image's photographs,
    made in data/benchmark."""
    tuned: Path | None = None
    """File of `throughput.py tune`, whose pipeline settings go over the recipe's."""
    seconds: float = 60.0
    """Measured time of each mode, all turns together; at least five steps a turn. Default: 60 on a GPU, else 6."""
    repeats: int = 3
    """Turns; in each, every mode is measured once."""
    warmup: int = 30
    """Steps before anything is measured, the first of them with compilation."""
    json: Path | None = None
    """File to write everything to."""
    profile: Path | None = None
    """Folder for a trace of a few steps, by torch's profiler, as Chrome and Perfetto read it."""

    def check(self) -> None:
        """Raise BenchmarkError and ConfigError where options make no sense."""
        for name, value, least in (("repeats", self.repeats, 1), ("warmup", self.warmup, 1)):
            if value < least:
                raise BenchmarkError(f"--{name} {value}: must be at least {least}")
        if self.seconds <= 0:
            raise BenchmarkError(f"--seconds {self.seconds}: must be positive")
        self.config.check()

    def prepare(self, here: World, console: Console) -> None:
        """Every process calls this first: make the generated shards if they are meant, and say how it was tuned.

        Raises BenchmarkError where the shards have too few images for a step.
        """
        data = self.config.data
        if here.main and data.shards == GENERATED / "shards":
            generated_shards(console)
        here.gather("shards are there")
        if self.tuned is not None:
            for line in read_tuned(self.tuned).remarks(this_machine(here.device, here.local_size)):
                console.print(line, highlight=False, soft_wrap=True)
        samples = load_manifest(data.shards, data.train).samples
        if samples < data.batch:
            raise BenchmarkError(
                f"--data.batch {data.batch}: {data.shards} has only {samples} images in '{data.train}'"
            )


Options = TypeVar("Options", bound=StepOptions)


def begun(kind: type[Options], arguments: Sequence[str]) -> Options:
    """A mode's options as recipe, scenario and shards make them; the command line puts single fields over them.

    Raises BenchmarkError where there is no such recipe or scenario, ConfigError where a tuned file is no good.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="iwm_b16_equi_18x384" if torch.cuda.is_available() else "demo")
    first.add_argument("--scenario")
    first.add_argument("--shards", type=Path)
    first.add_argument("--tuned", type=Path)
    chosen = first.parse_known_args(arguments)[0]
    config = named("--recipe", chosen.recipe, RECIPES)()
    if chosen.scenario is not None:
        named("--scenario", chosen.scenario, SCENARIOS)
        config = with_scenario(config, chosen.scenario)
    if chosen.tuned is not None:
        config = read_tuned(chosen.tuned).over(config)
    most = BATCH_EACH * int(os.environ.get("WORLD_SIZE", 1))
    data = replace(
        config.data, shards=chosen.shards or GENERATED / "shards", batch=min(config.data.batch, most), val=None
    )
    return kind(
        replace(config, data=data),
        recipe=chosen.recipe,
        scenario=chosen.scenario,
        shards=chosen.shards,
        tuned=chosen.tuned,
        seconds=60.0 if torch.cuda.is_available() else 6.0,
    )

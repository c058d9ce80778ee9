"""How fast is it? One mode per part of the way that data takes; design and vocabulary are in docs/architecture.md.

python benchmarks/throughput.py data [--recipe R] [--shards DIR] [--baseline torchvision] [--json FILE]

python benchmarks/throughput.py all [--recipe R] [--scenario S] [--shards DIR] [--SECTION.FIELD V] [--plot FILE]

torchrun --nproc_per_node N benchmarks/throughput.py scaling [--recipe R] [--images I]
"""

from __future__ import annotations

import dali_pipelines.command  # noqa: F401  # isort: skip  # first: it sets how torch's threads wait

import json
import sys
from collections.abc import Callable
from typing import Any

import data_mode
import scaling_mode
import training_mode
import tune_mode
import tyro
from data_mode import Data
from machine import machine
from mistakes import BenchmarkError, make_room_for
from picture import draw
from rich.console import Console
from scaling_mode import Scaling
from step_options import begun
from training_mode import All, EndToEnd, Interference, Model
from tune_mode import Tune

from iwm.config import ConfigError
from shards.manifest import ShardError

Run = Callable[[Any, Console], dict[str, Any]]


def modes(arguments: list[str]) -> dict[str, tuple[Any, Run]]:
    """Of each mode the options to begin with, and what runs it: it prints tables and returns what goes into --json.

    Raises BenchmarkError and ConfigError where recipe, scenario or a tuned file do not exist.
    """
    return {
        "data": (Data(), data_mode.run),
        "model": (begun(Model, arguments), training_mode.run),
        "end-to-end": (begun(EndToEnd, arguments), training_mode.run),
        "interference": (begun(Interference, arguments), training_mode.run),
        "all": (begun(All, arguments), training_mode.run),
        "tune": (Tune(), tune_mode.run),
        "scaling": (begun(Scaling, arguments), scaling_mode.run),
    }


def main() -> int:
    arguments, console = sys.argv[1:], Console()
    try:
        choices = modes(arguments)
        options = tyro.extras.overridable_config_cli(
            {name: ((type(begin).__doc__ or "").partition("\n")[0], begin) for name, (begin, _) in choices.items()},
            args=arguments,
            description=__doc__,
            prog="benchmarks/throughput.py",
        )
        for option, file in (("--json", options.json), ("--plot", getattr(options, "plot", None))):
            if file is not None:
                make_room_for(option, file)
        run = next(run for begin, run in choices.values() if type(begin) is type(options))
        result = {"mode": arguments[0], **run(options, console), "machine": machine()}
    except (BenchmarkError, ConfigError, ShardError) as error:
        print(f"benchmarks/throughput.py: {error}", file=sys.stderr)
        return 1
    if isinstance(options, All) and options.plot is not None and not console.quiet:
        draw(result, options.plot)
        console.print(f"drawn to {options.plot}", soft_wrap=True)
    if options.json is not None and not console.quiet:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {options.json}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

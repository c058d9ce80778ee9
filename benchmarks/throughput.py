"""Throughput benchmarks of data pipeline and training, one mode for each part (docs/architecture.md).

python benchmarks/throughput.py data [--recipe R] [--shards DIR] [--baseline torchvision] [--json FILE]

python benchmarks/throughput.py all [--recipe R] [--scenario S] [--shards DIR] [--SECTION.FIELD V] [--plot FILE]

torchrun --nproc_per_node N benchmarks/throughput.py scaling [--recipe R] [--images I]
"""

from __future__ import annotations

import dali_pipelines.command  # noqa: F401  # isort: skip  # first: it exits with a message if DALI is missing

import json
import sys
from collections.abc import Callable
from typing import Any

import autotune
import loaders
import scaling
import training
import tyro
from autotune import TuneOptions
from environment import check_writable, environment_info
from loaders import LoaderOptions
from options import default_options
from rich.console import Console
from scaling import ScalingOptions
from tables import draw
from training import AllOptions, EndToEndOptions, InterferenceOptions, ModelOptions

from shards.errors import run_command

ModeRunner = Callable[[Any, Console], dict[str, Any]]


def modes(arguments: list[str]) -> dict[str, tuple[Any, ModeRunner]]:
    """Return each mode's default options and its runner, which prints tables and returns the results for --json.

    Raises BenchmarkError where the recipe or scenario does not exist.
    """
    return {
        "data": (LoaderOptions(), loaders.run),
        "model": (default_options(ModelOptions, arguments), training.run),
        "end-to-end": (default_options(EndToEndOptions, arguments), training.run),
        "interference": (default_options(InterferenceOptions, arguments), training.run),
        "all": (default_options(AllOptions, arguments), training.run),
        "tune": (TuneOptions(), autotune.run),
        "scaling": (default_options(ScalingOptions, arguments), scaling.run),
    }


def main() -> None:
    arguments, console = sys.argv[1:], Console()
    choices = modes(arguments)
    options = tyro.extras.overridable_config_cli(
        {name: ((type(begin).__doc__ or "").partition("\n")[0], begin) for name, (begin, _) in choices.items()},
        args=arguments,
        description=__doc__,
        prog="benchmarks/throughput.py",
    )
    for option, file in (("--json", options.json), ("--plot", getattr(options, "plot", None))):
        if file is not None:
            check_writable(option, file)
    run = next(run for begin, run in choices.values() if type(begin) is type(options))
    result = {"mode": arguments[0], **run(options, console), "machine": environment_info()}
    if isinstance(options, AllOptions) and options.plot is not None and not console.quiet:
        draw(result, options.plot)
        console.print(f"drawn to {options.plot}", soft_wrap=True)
    if options.json is not None and not console.quiet:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {options.json}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/throughput.py"))

"""Throughput benchmarks of data pipeline and training, one mode for each part (docs/architecture.md).

python benchmarks/throughput.py data [--recipe R] [--shards DIR] [--baseline torchvision] [--json FILE]

python benchmarks/throughput.py all [--recipe R] [--scenario S] [--shards DIR] [--SECTION.FIELD V] [--plot FILE]

python benchmarks/throughput.py downstream [--recipe R] [--protocols P ...]

python benchmarks/throughput.py traffic [--recipe R] [--batch-size B] [--SECTION.FIELD V]

torchrun --nproc_per_node N benchmarks/throughput.py scaling [--recipe R] [--images I]
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import tyro
from environment import check_writable, environment_info
from options import (
    AllOptions,
    DownstreamRateOptions,
    EndToEndOptions,
    InterferenceOptions,
    LoaderOptions,
    ModelOptions,
    ScalingOptions,
    TuneOptions,
    default_options,
    traffic_options,
)
from rich.console import Console

from shards.errors import run_command


def modes(arguments: list[str]) -> dict[str, tuple[Any, str]]:
    """Return each mode's default options and the module whose `run` prints its tables and returns its results.

    Raises BenchmarkError where the recipe or scenario does not exist.
    """
    return {
        "data": (LoaderOptions(), "loaders"),
        "model": (default_options(ModelOptions, arguments), "training"),
        "end-to-end": (default_options(EndToEndOptions, arguments), "training"),
        "interference": (default_options(InterferenceOptions, arguments), "training"),
        "all": (default_options(AllOptions, arguments), "training"),
        "tune": (TuneOptions(), "autotune"),
        "scaling": (default_options(ScalingOptions, arguments), "scaling"),
        "downstream": (DownstreamRateOptions(), "downstream"),
        "traffic": (traffic_options(arguments), "traffic"),
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
    # Imported late: DALI and timm take seconds to import, and a mistyped option must fail before.
    module = import_module(next(module for begin, module in choices.values() if type(begin) is type(options)))
    result = {"mode": arguments[0], **module.run(options, console), "machine": environment_info()}
    if isinstance(options, AllOptions) and options.plot is not None and not console.quiet:
        import_module("tables").draw(result, options.plot)
        console.print(f"drawn to {options.plot}", soft_wrap=True)
    if options.json is not None and not console.quiet:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {options.json}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/throughput.py"))

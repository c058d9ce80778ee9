"""Throughput benchmarks of data pipeline and training, one mode for each part (docs/architecture.md).

python benchmarks/throughput.py data [--recipe R] [--shards DIR] [--baseline torchvision] [--json FILE]

python benchmarks/throughput.py all [--recipe R] [--scenario S] [--shards DIR] [--SECTION.FIELD V] [--plot FILE]

python benchmarks/throughput.py downstream [--recipe R] [--protocols P ...]

python benchmarks/throughput.py traffic [--recipe R] [--batch-size B] [--SECTION.FIELD V]

python benchmarks/throughput.py ijepa-parity [--recipes R ...]

torchrun --nproc_per_node N benchmarks/throughput.py scaling [--recipe R] [--images I]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from environment import check_writable, environment_info
from options import (
    AllOptions,
    DownstreamRateOptions,
    EndToEndOptions,
    IjepaParityOptions,
    InterferenceOptions,
    LoaderOptions,
    ModelOptions,
    ScalingOptions,
    TuneOptions,
    default_options,
    traffic_options,
)
from rich.console import Console

from shards.command_line import Subcommand, parse_subcommand, run_command


def modes(arguments: Sequence[str]) -> dict[str, tuple[Any, str]]:
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
        "ijepa-parity": (IjepaParityOptions(), "ijepa_parity"),
    }


def main(arguments: Sequence[str] | None = None, prog: str = "benchmarks/throughput.py") -> None:
    """Run a mode. arguments: None for those of the program. Raises UserError for what the user can fix."""
    arguments, console = sys.argv[1:] if arguments is None else arguments, Console()
    choices = modes(arguments)
    mode, options = parse_subcommand(
        {name: Subcommand(type(begin), begin) for name, (begin, _) in choices.items()},
        arguments,
        prog=prog,
        description=__doc__,
        noun="mode",
    )
    for option, file in (("--json", options.json), ("--plot", getattr(options, "plot", None))):
        if file is not None:
            check_writable(option, file)
    # Imported late: DALI and timm take seconds to import, and a mistyped option must fail before.
    module = import_module(choices[mode][1])
    result = {"mode": mode, **module.run(options, console), "machine": environment_info()}
    if isinstance(options, AllOptions) and options.plot is not None and not console.quiet:
        import_module("tables").draw(result, options.plot)
        console.print(f"drawn to {options.plot}", soft_wrap=True)
    if options.json is not None and not console.quiet:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {options.json}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/throughput.py"))

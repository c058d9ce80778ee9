"""How fast is it? One mode per part of the way that data takes; design and vocabulary are in docs/architecture.md.

python benchmarks/throughput.py data [--recipe R] [--shards DIR] [--baseline torchvision] [--json FILE]
"""

from __future__ import annotations

import json
import sys

import data_mode
import tyro
from machine import machine
from mistakes import BenchmarkError
from rich.console import Console

from shards.manifest import ShardError


def main() -> int:
    console = Console()
    options = tyro.extras.subcommand_cli_from_dict(
        {"data": data_mode.Data}, description=__doc__, prog="benchmarks/throughput.py"
    )
    try:
        result = {**data_mode.run(options, console), "machine": machine()}
    except (BenchmarkError, ShardError) as error:
        print(f"benchmarks/throughput.py: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command `iwm`: every command of the project under one name.

Each subcommand is the main function of a module, which is imported only when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import iwm
from shards.command_line import print_overview, run_command, unknown_name
from shards.errors import UserError

DESCRIPTION = """Image World Models: make shards, train, evaluate, export.

On several GPUs: torchrun --nproc_per_node 8 -m iwm.train RECIPE …, and -m iwm.evaluate EVALUATION …"""


class Command(NamedTuple):
    """A subcommand: its summary, the module whose `main` it runs, and arguments that precede the user's."""

    summary: str
    module: str
    leading: tuple[str, ...] = ()


COMMANDS = {
    "shards": Command("Make shards from images: SRC OUT [--val-fraction 0.05] [--resize 320]", "shards.__main__"),
    "verify": Command("Check a shard folder: OUT", "shards.__main__", ("verify",)),
    "train": Command("Pretrain a model: RECIPE --data.shards DIR", "iwm.train"),
    "evaluate": Command("Evaluate a checkpoint: world-model, mrr, linear, … --checkpoint RUN", "iwm.evaluate"),
    "ablate": Command("Run an ablation study of the paper: STUDY RECIPE", "iwm.ablate"),
    "report": Command("Write the page of a run, or one page that compares runs: RUN [RUN ...]", "iwm.report.__main__"),
    "export": Command("Export a model as safetensors with a model card: RUN OUT", "iwm.export.__main__"),
    "bench": Command("Measure speed: data, model, all, tune, …", "throughput"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("", "-h", "--help"):
        print_overview({key: command.summary for key, command in COMMANDS.items()}, "iwm", DESCRIPTION, "command")
        return 0 if name else 2
    if name == "--version":
        print(f"iwm {iwm.__version__}")
        return 0
    return run_command(partial(_run, name, rest), f"iwm {name}" if name in COMMANDS else "iwm")


def _run(name: str, arguments: Sequence[str]) -> int | None:
    command = COMMANDS.get(name)
    if command is None:
        raise UserError(unknown_name("command", name, COMMANDS))
    if name == "bench":
        sys.path.insert(0, str(scripts_folder() / "benchmarks"))
    run: Callable[[Sequence[str], str], int | None] = import_module(command.module).main
    return run([*command.leading, *arguments], "iwm" if command.leading else f"iwm {name}")


def scripts_folder() -> Path:
    """Return the folder that contains `benchmarks` and `tools`: iwm/_scripts in a wheel, the root of a checkout."""
    package = Path(__file__).parent
    packed = package / "_scripts"
    return packed if packed.is_dir() else package.parent


if __name__ == "__main__":
    sys.exit(main())

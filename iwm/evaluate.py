"""Evaluate a checkpoint: python iwm/evaluate.py NAME --checkpoint RUN_OR_FILE [--SECTION.FIELD VALUE ...]

Writes RUN/eval/NAME.json, prints its tables and regenerates RUN/report.html. Downstream protocols (linear, attentive,
…) also run under torchrun and save checkpoints and metrics in RUN/eval/NAME/; rerun the same command to resume.
`table` prints the paper's downstream tables with your results: python iwm/evaluate.py table --runs RUN [RUN ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from iwm.config import ConfigError
from iwm.downstream.registry import PROTOCOLS
from iwm.downstream.settings import TrainSettings
from iwm.evaluation.registry import EVALUATORS
from iwm.evaluation.settings import WorldModelSettings
from shards.errors import run_command


@dataclass(frozen=True)
class TableOptions:
    """Print the paper's downstream tables with the results of these runs. Tables without results are omitted."""

    runs: tuple[Path, ...]
    """Run folders, for example runs/demo."""
    markdown: Path | None = None
    """Markdown file to which the tables are also written."""


def parse(arguments: Sequence[str] | None = None) -> tuple[str, Any]:
    """Parse `arguments` or the command line; return the command's name and its settings."""
    settings_of: dict[str, Any] = {name: evaluator.settings for name, evaluator in EVALUATORS.items()}
    settings_of |= {name: protocol.settings for name, protocol in PROTOCOLS.items()}
    settings_of |= {"world-model": WorldModelSettings, "table": TableOptions}
    commands: Any = Union[  # noqa: UP007  a union made of a variable's items cannot be written with |
        tuple(Annotated[settings, tyro.conf.subcommand(name)] for name, settings in settings_of.items())
    ]
    settings = tyro.cli(commands, args=arguments, description=__doc__, prog="iwm/evaluate.py")
    return next(name for name, kind in settings_of.items() if type(settings) is kind), settings


def main() -> None:
    name, settings = parse()
    # Imported late: torch and DALI take seconds to import, and a mistyped option must fail at once.
    import torch

    from iwm.protocols import evaluate, evaluate_everything, show_tables, train_and_evaluate

    try:
        if isinstance(settings, WorldModelSettings):
            evaluate_everything(settings)
        elif isinstance(settings, TableOptions):
            show_tables(settings.runs, settings.markdown)
        elif isinstance(settings, TrainSettings):
            train_and_evaluate(name, settings)
        else:
            evaluate(name, settings)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device is out of memory ({error}); lower --bank.batch-size or --micro-batch-size"
        ) from error


if __name__ == "__main__":
    sys.exit(run_command(main, "iwm/evaluate.py"))

"""Evaluate a checkpoint: EVALUATION --checkpoint RUN_OR_FILE [--SECTION.FIELD VALUE ...]

Writes RUN/eval/NAME.json, prints its tables and regenerates RUN/report.html. Downstream protocols (linear, attentive,
…) also run under torchrun and save checkpoints and metrics in RUN/eval/NAME/; rerun the same command to resume.
`table` prints the paper's downstream tables with your results: table --runs RUN [RUN ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm.config import ConfigError
from iwm.downstream.registry import PROTOCOLS
from iwm.downstream.settings import TrainSettings
from iwm.evaluation.registry import EVALUATORS
from iwm.evaluation.settings import EvalSettings, WorldModelSettings
from iwm.ranges import check_ranges
from iwm.training.launch import find_launch
from shards.command_line import Subcommand, parse_subcommand, run_command


@dataclass(frozen=True)
class TableOptions:
    """Print the paper's downstream tables with the results of these runs. Tables without results are omitted."""

    runs: tuple[Path, ...]
    """Run folders, for example runs/demo."""
    markdown: Path | None = None
    """Markdown file to which the tables are also written."""


def parse(arguments: Sequence[str], prog: str = "iwm/evaluate.py") -> tuple[str, Any]:
    """Parse `arguments`; return the name of the evaluator, protocol or other command, and its settings.

    Raises UserError for an unknown name, SystemExit for invalid options.
    """
    settings: dict[str, Any] = {name: evaluator.settings for name, evaluator in EVALUATORS.items()}
    settings |= {"world-model": WorldModelSettings}
    settings |= {name: protocol.settings for name, protocol in PROTOCOLS.items()}
    settings |= {"table": TableOptions}
    names = {name: Subcommand(kind) for name, kind in settings.items()}
    return parse_subcommand(names, arguments, prog=prog, description=__doc__, noun="evaluation")


def check(settings: EvalSettings | TrainSettings) -> None:
    """Raise ConfigError for options that are out of range or contradict each other, and for a missing checkpoint."""
    if isinstance(settings, TrainSettings):
        settings.check()
    else:
        check_ranges(settings)
    if not settings.checkpoint.exists():
        raise ConfigError(f"--checkpoint {settings.checkpoint} does not exist; correct the path")


def check_processes(name: str) -> None:
    """Raise ConfigError where torchrun has started several processes of an evaluation that runs on one.

    Tasks of a Slurm step are not refused: each may evaluate another run.
    """
    if "RANK" in os.environ and (size := find_launch(os.environ).size) > 1:
        raise ConfigError(
            f"{name} runs on one process, and torchrun has started {size}; start it with python instead "
            f"(on several run: {', '.join(PROTOCOLS)})"
        )


def main(arguments: Sequence[str] | None = None, prog: str = "iwm/evaluate.py") -> None:
    """Evaluate. arguments: None for those of the program. Raises UserError for what the user can fix."""
    name, settings = parse(sys.argv[1:] if arguments is None else arguments, prog)
    if not isinstance(settings, TrainSettings):
        check_processes(name)
    if not isinstance(settings, TableOptions):
        check(settings)
    # Imported late: torch and DALI take seconds to import, and a mistyped option or path must fail at once.
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
        raise ConfigError(f"the device is out of memory ({error}); lower --micro-batch-size") from error


if __name__ == "__main__":
    sys.exit(run_command(main, "iwm/evaluate.py"))

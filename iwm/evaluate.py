"""Evaluate a checkpoint: python iwm/evaluate.py PROTOCOL --checkpoint RUN_OR_FILE [--SECTION.FIELD VALUE ...]

Writes RUN/eval/PROTOCOL.json, prints a table and renews RUN/report.html.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from types import ModuleType
from typing import Annotated, Any, Union

import torch
import tyro
from rich.console import Console

from iwm.config import ConfigError
from iwm.evaluation import explore, grids, knn, maps, marginal, mrr, retrieval, similarity, undo
from iwm.evaluation.settings import Settings
from iwm.evaluation.subject import Subject, load_subject
from iwm.report.page import write_report
from iwm.report.run_folder import ReportError
from iwm.training.checkpoint import CheckpointError, versions
from iwm.training.memory import keep_freed_memory
from shards.atomic import write_atomically
from shards.listing import LABEL
from shards.manifest import ShardError

PROTOCOLS: dict[str, ModuleType] = {
    "mrr": mrr,
    "retrieval": retrieval,
    "grids": grids,
    "undo": undo,
    "explore": explore,
    "similarity": similarity,
    "marginal": marginal,
    "maps": maps,
    "knn": knn,
}
"""A protocol is a module with a `Settings` dataclass that extends evaluation.settings', a function
`evaluate(subject, settings, output) -> dict` and `table(dict)` for the terminal. To add one: write it, name it here."""


def evaluate(name: str, settings: Settings) -> dict[str, Any]:
    """Run a protocol on a checkpoint, write its JSON and renew the run's page. Returns the result, whose keys are the
    protocol's own beside protocol, checkpoint, data, settings, seed, device, precision, versions and seconds."""
    subject = _open(settings)
    result = _judge(subject, name, settings)
    _renew_page(subject)
    return result


def _open(settings: Settings) -> Subject:
    subject = load_subject(settings)
    if subject.device.type == "cpu":
        keep_freed_memory()
        if subject.config.train.threads:
            torch.set_num_threads(subject.config.train.threads)  # a small model is slower with more
    return subject


def _judge(subject: Subject, name: str, settings: Settings) -> dict[str, Any]:
    start = time.perf_counter()
    output = settings.output or subject.run / "eval" / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    precision = subject.config.train.precision if settings.precision == "auto" else settings.precision
    with torch.autocast(subject.device.type, torch.bfloat16, enabled=precision == "bf16"):
        figures = PROTOCOLS[name].evaluate(subject, settings, output)
    result = {
        "protocol": name,
        "checkpoint": str(subject.checkpoint),
        "data": {"shards": str(subject.shards), "split": subject.split},
        **figures,
        "settings": asdict(settings),
        "seed": settings.seed,
        "device": subject.device_name,
        "precision": precision,
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 2),
    }
    try:
        content = json.dumps(result, indent=1, allow_nan=False, default=str)
    except ValueError as error:
        raise CheckpointError(
            f"{subject.checkpoint}: the model's features are not finite; evaluate an earlier checkpoint"
        ) from error
    write_atomically(output, (content + "\n").encode())
    console = Console()
    console.print(PROTOCOLS[name].table(result))
    console.print(f"written: {output}", soft_wrap=True)
    return result


def _renew_page(subject: Subject) -> None:
    Console().print(f"page: {write_report(subject.run)}", soft_wrap=True)


@dataclass(frozen=True)
class Everything(Settings):
    """All that shows what a world model can do: every protocol here, one after another, each with its own defaults."""

    label: str = LABEL
    """Column of labels for what needs one: linear accuracy (`marginal`) and nearest neighbours."""


def evaluate_everything(settings: Everything) -> None:
    """Run every protocol. One that does not go with the run or its data is told and left out.

    Raises ConfigError at the end where there was one, and at once for --output, of which there is no single one.
    """
    if settings.output is not None:
        raise ConfigError("--output: every protocol writes a file of its own, under RUN/eval; leave it out")
    common = {each.name: getattr(settings, each.name) for each in fields(Settings)}
    subject, left_out = _open(settings), []
    try:
        for name, protocol in PROTOCOLS.items():
            own = protocol.Settings(**common)
            if isinstance(own, marginal.Settings):
                own = replace(own, probe=replace(own.probe, label=settings.label))
            elif isinstance(own, knn.Settings):
                own = replace(own, label=settings.label)
            try:
                _judge(subject, name, own)
            except ConfigError as error:
                print(f"{name}: {error}", file=sys.stderr)
                left_out.append(name)
    finally:
        _renew_page(subject)
    if left_out:
        raise ConfigError(f"left out, for the reasons above: {', '.join(left_out)}")


def main() -> None:
    settings_of = {**{name: protocol.Settings for name, protocol in PROTOCOLS.items()}, "world-model": Everything}
    commands: Any = Union[  # noqa: UP007  a union made of a variable's items cannot be written with |
        tuple(Annotated[settings, tyro.conf.subcommand(name)] for name, settings in settings_of.items())
    ]
    settings = tyro.cli(commands, description=__doc__, prog="iwm/evaluate.py")
    name = next(name for name, its in settings_of.items() if type(settings) is its)
    try:
        if isinstance(settings, Everything):
            evaluate_everything(settings)
        else:
            evaluate(name, settings)
    except (CheckpointError, ConfigError, ReportError, ShardError, OSError) as error:
        sys.exit(f"iwm/evaluate.py: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"iwm/evaluate.py: the device has too little memory ({error}); lower --bank.chunk")


if __name__ == "__main__":
    main()

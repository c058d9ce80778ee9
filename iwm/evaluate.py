"""Evaluate a checkpoint: python iwm/evaluate.py PROTOCOL --checkpoint RUN_OR_FILE [--SECTION.FIELD VALUE ...]

Writes RUN/eval/PROTOCOL.json, prints a table and renews RUN/report.html. Protocols that train (linear, attentive, …)
also run under torchrun, keep what they trained in RUN/eval/PROTOCOL/, and go on from there when they are cut. `table`
prints the paper's tables with the results of these, as python iwm/evaluate.py table --runs RUN [RUN ...]
"""

from __future__ import annotations

import dali_pipelines.command  # noqa: F401  # isort: skip  # first: it ends the command where DALI is missing

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Union

import torch
import tyro
from rich.console import Console

from dali_pipelines.endless import StateError
from iwm.config import ConfigError, Train
from iwm.downstream import (
    attentive,
    finetune_encoder,
    finetune_end_to_end,
    finetune_predictor,
    linear,
    multitask,
    segmentation,
)
from iwm.downstream.bench import open_bench
from iwm.downstream.pretrained import load_pretrained
from iwm.downstream.settings import Training
from iwm.downstream.table import markdown, paper_tables
from iwm.evaluation import explore, grids, knn, maps, marginal, mrr, retrieval, similarity, undo
from iwm.evaluation.settings import Settings
from iwm.evaluation.subject import Subject, load_subject
from iwm.report.page import write_report
from iwm.report.run_folder import ReportError
from iwm.training.checkpoint import CheckpointError, versions
from iwm.training.distributed import device_name, world
from iwm.training.memory import keep_freed_memory
from iwm.training.resume import locked
from iwm.training.signals import stop_on_signal
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
"""Those that show the world model. A protocol is a module with a `Settings` that extends evaluation.settings', a
function `evaluate(subject, settings, output) -> dict` and `table(dict)` for the terminal. To add one: write it, name it
here."""

TRAINED: dict[str, ModuleType] = {
    "linear": linear,
    "attentive": attentive,
    "finetune-encoder": finetune_encoder,
    "finetune-predictor": finetune_predictor,
    "finetune-end-to-end": finetune_end_to_end,
    "multitask": multitask,
    "segmentation": segmentation,
}
"""Those that leverage it: they train, on one process or several. Here `evaluate(bench, settings, wish) -> dict | None`,
None where a signal ended the training early."""


def evaluate(name: str, settings: Settings) -> dict[str, Any]:
    """Run a protocol on a checkpoint, write its JSON and renew the run's page. Returns the result, whose keys are the
    protocol's own beside protocol, checkpoint, data, settings, seed, device, precision, versions and seconds."""
    subject = _open(settings)
    result = _judge(subject, name, settings)
    _renew_page(subject.run)
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
    figures = {"checkpoint": str(subject.checkpoint), "data": _data(subject), **figures}
    return _publish(name, PROTOCOLS[name], figures, settings, output, subject.device_name, precision, start)


def _data(subject: Subject) -> dict[str, str]:
    return {"shards": str(subject.shards), "split": subject.split}


def _publish(
    name: str,
    protocol: ModuleType,
    figures: dict[str, Any],
    settings: Settings,
    output: Path,
    device: str,
    precision: str,
    start: float,
) -> dict[str, Any]:
    """Write the result and print its table."""
    result = {
        "protocol": name,
        **figures,
        "settings": asdict(settings),
        "seed": settings.seed,
        "device": device,
        "precision": precision,
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 2),
    }
    try:
        content = json.dumps(result, indent=1, allow_nan=False, default=str)
    except ValueError as error:
        raise CheckpointError(
            f"{figures['checkpoint']}: the model's features are not finite; evaluate an earlier checkpoint"
        ) from error
    write_atomically(output, (content + "\n").encode())
    console = _console()
    console.print(protocol.table(result))
    console.print(f"written: {output}", soft_wrap=True)
    return result


def train_and_evaluate(name: str, settings: Training) -> dict[str, Any] | None:
    """Run a protocol that trains, on this process's share; the first process writes the JSON and renews the page.

    None where a signal ended the training early: the same command goes on.
    """
    start = time.perf_counter()
    with world(Train(device=settings.device, threads=settings.threads), "--") as here, stop_on_signal() as wish:
        settings.check()
        pretrained = load_pretrained(settings, here.device)
        output = settings.output or pretrained.run / "eval" / f"{name}.json"
        with locked(output.with_suffix(""), "--output") if here.main else nullcontext():
            bench = open_bench(name, settings, pretrained, output, here)
            figures = TRAINED[name].evaluate(bench, settings, wish)
        if figures is None or not here.main:
            return None
        precision = "bf16" if pretrained.bf16 else "fp32"
        figures = {
            "checkpoint": str(pretrained.checkpoint),
            "data": {"shards": str(pretrained.shards), "split": pretrained.val},
            **figures,
            "processes": here.size,
        }
        result = _publish(name, TRAINED[name], figures, settings, output, device_name(here.device), precision, start)
        if pretrained.config is not None:
            _renew_page(pretrained.run)
        return result


def _console() -> Console:
    """Return the terminal, without emoji: a task may be named FOLDER:label, which Rich would print as a picture."""
    return Console(emoji=False)


def _renew_page(run: Path) -> None:
    _console().print(f"page: {write_report(run)}", soft_wrap=True)


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
        _renew_page(subject.run)
    if left_out:
        raise ConfigError(f"left out, for the reasons above: {', '.join(left_out)}")


@dataclass(frozen=True)
class Tables:
    """The paper's downstream tables with what these runs have in eval/ below or beside: only what was run."""

    runs: tuple[Path, ...]
    """Folders of runs, as runs/demo."""
    markdown: Path | None = None
    """Markdown file to write them to as well."""


def show_tables(settings: Tables) -> None:
    """Print the tables, and write them where --markdown says. Raises ReportError, which names folder or file."""
    if not settings.runs:
        raise ReportError("--runs: name at least one run's folder, as --runs runs/demo")
    made = paper_tables(settings.runs)
    for grid in made:
        _console().print(grid.for_terminal())
    if settings.markdown is not None:
        write_atomically(settings.markdown, markdown(made).encode())
        _console().print(f"written: {settings.markdown}", soft_wrap=True)


def parse(arguments: Sequence[str] | None = None) -> tuple[str, Any]:
    """A command's name and its settings, from `arguments` or the command line."""
    protocols = PROTOCOLS | TRAINED
    settings_of: dict[str, Any] = {name: protocol.Settings for name, protocol in protocols.items()}
    settings_of |= {"world-model": Everything, "table": Tables}
    commands: Any = Union[  # noqa: UP007  a union made of a variable's items cannot be written with |
        tuple(Annotated[settings, tyro.conf.subcommand(name)] for name, settings in settings_of.items())
    ]
    settings = tyro.cli(commands, args=arguments, description=__doc__, prog="iwm/evaluate.py")
    return next(name for name, its in settings_of.items() if type(settings) is its), settings


def main() -> None:
    name, settings = parse()
    try:
        if isinstance(settings, Everything):
            evaluate_everything(settings)
        elif isinstance(settings, Tables):
            show_tables(settings)
        elif isinstance(settings, Training):
            train_and_evaluate(name, settings)
        else:
            evaluate(name, settings)
    except (CheckpointError, ConfigError, ReportError, ShardError, StateError, OSError) as error:
        sys.exit(f"iwm/evaluate.py: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"iwm/evaluate.py: the device has too little memory ({error}); lower --bank.chunk or --micro-batch")


if __name__ == "__main__":
    main()

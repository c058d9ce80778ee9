"""Runs of evaluators and downstream protocols: from a checkpoint to printed tables, a JSON file and the run's page."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from iwm.config import ConfigError
from iwm.downstream.context import open_run
from iwm.downstream.pretrained import load_pretrained
from iwm.downstream.registry import lookup
from iwm.downstream.settings import TrainSettings
from iwm.evaluation.common import EvalContext, load_eval_context
from iwm.evaluation.held_out import MissingDataError, naming_command
from iwm.evaluation.registry import EVALUATORS, WORLD_MODEL
from iwm.evaluation.result_table import ResultTable
from iwm.evaluation.settings import EvalSettings, KNNSettings, MarginalisationSettings, WorldModelSettings
from iwm.ranges import check_ranges
from iwm.report.page import write_report
from iwm.report.paper_tables import markdown, paper_tables
from iwm.report.runs import ReportError, read_result
from iwm.train_config import TrainConfig
from iwm.training.checkpoint import CheckpointError, versions
from iwm.training.distributed import init_distributed
from iwm.training.runtime import configure_cpu, device_name, stop_on_signal
from iwm.training.train_state import run_lock
from iwm.training.watchdog import Watchdog
from shards.atomic import write_atomically
from shards.cache import location_of


def evaluate(name: str, settings: EvalSettings) -> dict[str, Any]:
    """Run an evaluator on a checkpoint, write its JSON and regenerate the run's page.

    Returns the result: the evaluator's keys plus protocol, checkpoint, data, notes, settings, seed, device,
    precision, versions, seconds and tables.
    """
    check_ranges(settings)
    context = _load_context(settings)
    result = _evaluate(context, name, settings)
    _print_left_out(result.get("left_out", {}))
    _write_page(context.run)
    return result


def _load_context(settings: EvalSettings) -> EvalContext:
    context = load_eval_context(settings)
    if context.data.note is not None:
        _print_line(f"note: {context.data.note}")
    if context.device.type == "cpu":
        configure_cpu(context.config.train.num_threads)
    return context


def _evaluate(context: EvalContext, name: str, settings: EvalSettings) -> dict[str, Any]:
    start = time.perf_counter()
    context = replace(context, notes=[])
    output = settings.output or context.run / "eval" / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    precision = _precision(context, settings)
    try:
        with torch.autocast(context.device.type, torch.bfloat16, enabled=precision == "bf16"):
            figures = EVALUATORS[name].evaluate(context, settings, output)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device is out of memory ({' '.join(str(error).split())}); lower {_memory_option(settings)}"
        ) from error
    figures = {
        "checkpoint": str(context.checkpoint),
        "data": context.data.record(),
        "notes": context.notes,
        **figures,
    }
    result = _publish(name, EVALUATORS[name].tables, figures, settings, output, context.device_name, precision, start)
    _no_longer_left_out(context.run, name, output)
    return result


def _precision(context: EvalContext, settings: EvalSettings) -> str:
    trained = "bf16" if context.config.train.bf16_autocast else "fp32"
    return trained if settings.precision == "auto" else settings.precision


def _memory_option(settings: EvalSettings) -> str:
    """Return the evaluator's option that bounds its memory."""
    options = {field.name for field in fields(settings)}
    return "--bank.batch-size" if "bank" in options else "--batch-size" if "batch_size" in options else "--num-images"


def _no_longer_left_out(run: Path, name: str, output: Path) -> None:
    """Remove an evaluator with a new result on the run's page from the list of those that `world-model` left out."""
    path = run / "eval" / f"{WORLD_MODEL}.json"
    if path.exists() and output.resolve().parent == path.resolve().parent:
        summary = read_result(path)
        if summary.get("left_out", {}).pop(name, None) is not None:
            write_atomically(path, (json.dumps(summary, indent=1) + "\n").encode())


def _publish(
    name: str,
    tables: Callable[[dict[str, Any]], list[ResultTable]],
    figures: dict[str, Any],
    settings: EvalSettings,
    output: Path,
    device: str,
    precision: str,
    start: float,
) -> dict[str, Any]:
    """Write the result with its tables as JSON, and print its tables and notes."""
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
    result_tables = tables(result)
    result["tables"] = [asdict(table) for table in result_tables]
    try:
        content = json.dumps(result, indent=1, allow_nan=False, default=str)
    except ValueError as error:
        raise CheckpointError(
            f"{figures['checkpoint']}: the model's features are not finite; evaluate an earlier checkpoint"
        ) from error
    write_atomically(output, (content + "\n").encode())
    console = _console()
    for table in result_tables:
        console.print(table)
    for note in result.get("notes", ()):
        _print_line(f"note: {note}")
    _print_line(f"written: {output}")
    return result


def train_and_evaluate(name: str, settings: TrainSettings) -> dict[str, Any] | None:
    """Run a protocol that trains, in each process; the main process writes the JSON and regenerates the page.

    Returns None on other processes, and if a signal stopped the training; rerun the same command to resume.
    """
    start = time.perf_counter()
    train = TrainConfig(device=settings.device, num_threads=settings.num_threads)
    with (
        Watchdog(train.collective_timeout) as watchdog,
        init_distributed(train, "--", watchdog) as dist,
        stop_on_signal() as stop,
        watchdog.explaining_losses(),
    ):
        settings.check()
        pretrained = load_pretrained(settings, dist.device)
        output = settings.output or pretrained.run / "eval" / f"{name}.json"
        with run_lock(output.with_suffix(""), "--output") if dist.is_main else nullcontext():
            context = open_run(name, settings, pretrained, output, dist)
            figures = lookup(name).runner.run(context, settings, stop)
        if figures is None or not dist.is_main:
            return None
        precision = "bf16" if pretrained.bf16 else "fp32"
        figures = {
            "checkpoint": str(pretrained.checkpoint),
            "data": {"shards": location_of(pretrained.shards), "split": pretrained.val},
            **figures,
            "processes": dist.size,
        }
        result = _publish(
            name, lookup(name).runner.tables, figures, settings, output, device_name(dist.device), precision, start
        )
        if pretrained.config is not None:
            _write_page(pretrained.run)
        return result


def _console() -> Console:
    """Return the terminal console without emoji codes, because a task may be named FOLDER:label."""
    return Console(emoji=False)


def _print_line(text: str) -> None:
    _console().print(text, soft_wrap=True, markup=False)


def _print_left_out(left_out: dict[str, str]) -> None:
    for name, reason in left_out.items():
        _print_line(f"left out: {name}: {reason}")


def _write_page(run: Path) -> None:
    _print_line(f"page: {write_report(run)}")


def evaluate_everything(settings: WorldModelSettings) -> None:
    """Run every evaluator, and list those that were left out in RUN/eval/world-model.json.

    One for which the data lack something is left out, with the reason. One that is invalid for the run or the settings
    is reported and skipped. Raises ConfigError at the end if one was skipped.
    """
    check_ranges(settings)
    start = time.perf_counter()
    common = {field.name: getattr(settings, field.name) for field in fields(EvalSettings)}
    context = _load_context(settings)
    left_out, parts, failed = dict[str, str](), dict[str, str](), dict[str, str]()
    try:
        for name, evaluator in EVALUATORS.items():
            own = evaluator.settings(**common)
            if isinstance(own, MarginalisationSettings):
                own = replace(own, probe=replace(own.probe, label=settings.label))
            elif isinstance(own, KNNSettings):
                own = replace(own, label=settings.label)
            try:
                result = _evaluate(context, name, own)
                parts |= {f"{name}, {part}": reason for part, reason in result.get("left_out", {}).items()}
            except MissingDataError as error:
                left_out[name] = naming_command(error, name)
            except ConfigError as error:
                print(f"{name}: {naming_command(error, name)}", file=sys.stderr)
                failed[name] = naming_command(error, name)
        not_done = {**left_out, **failed}
        summary = {"checkpoint": str(context.checkpoint), "data": context.data.record(), "left_out": not_done}
        output, precision = context.run / "eval" / f"{WORLD_MODEL}.json", _precision(context, settings)
        _publish(WORLD_MODEL, lambda _: [], summary, settings, output, context.device_name, precision, start)
    finally:
        _write_page(context.run)
    _print_left_out({**parts, **left_out})
    if failed:
        raise ConfigError(f"skipped, for the reasons above: {', '.join(failed)}")


def show_tables(runs: Sequence[Path], markdown_file: Path | None = None) -> None:
    """Print the paper's downstream tables with the results of `runs`, and write them to a Markdown file.

    Raises ReportError, which names the folder or file.
    """
    if not runs:
        raise ReportError("--runs: name at least one run folder, for example --runs runs/demo")
    tables = paper_tables(runs)
    for table in tables:
        _console().print(table)
    if markdown_file is not None:
        write_atomically(markdown_file, markdown(tables).encode())
        _console().print(f"written: {markdown_file}", soft_wrap=True)

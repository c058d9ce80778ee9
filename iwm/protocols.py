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

from iwm.config import ConfigError, TrainConfig
from iwm.downstream.context import open_run
from iwm.downstream.pretrained import load_pretrained
from iwm.downstream.registry import lookup
from iwm.downstream.settings import TrainSettings
from iwm.evaluation.common import EvalContext, load_eval_context
from iwm.evaluation.registry import EVALUATORS
from iwm.evaluation.result_table import ResultTable
from iwm.evaluation.settings import EvalSettings, KNNSettings, MarginalisationSettings, WorldModelSettings
from iwm.ranges import check_ranges
from iwm.report.page import write_report
from iwm.report.paper_tables import markdown, paper_tables
from iwm.report.runs import ReportError
from iwm.training.checkpoint import CheckpointError, versions
from iwm.training.distributed import init_distributed
from iwm.training.runtime import configure_cpu, device_name, stop_on_signal
from iwm.training.train_state import run_lock
from shards.atomic import write_atomically


def evaluate(name: str, settings: EvalSettings) -> dict[str, Any]:
    """Run an evaluator on a checkpoint, write its JSON and regenerate the run's page.

    Returns the result: the evaluator's keys plus protocol, checkpoint, data, settings, seed, device,
    precision, versions, seconds and tables.
    """
    check_ranges(settings)
    context = _load_context(settings)
    result = _evaluate(context, name, settings)
    _write_page(context.run)
    return result


def _load_context(settings: EvalSettings) -> EvalContext:
    context = load_eval_context(settings)
    if context.device.type == "cpu":
        configure_cpu(context.config.train.num_threads)
    return context


def _evaluate(context: EvalContext, name: str, settings: EvalSettings) -> dict[str, Any]:
    start = time.perf_counter()
    output = settings.output or context.run / "eval" / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    trained = "bf16" if context.config.train.bf16_autocast else "fp32"
    precision = trained if settings.precision == "auto" else settings.precision
    with torch.autocast(context.device.type, torch.bfloat16, enabled=precision == "bf16"):
        figures = EVALUATORS[name].evaluate(context, settings, output)
    figures = {
        "checkpoint": str(context.checkpoint),
        "data": {"shards": str(context.shards), "split": context.split},
        **figures,
    }
    return _publish(name, EVALUATORS[name].tables, figures, settings, output, context.device_name, precision, start)


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
    """Write the result with its tables as JSON, and print the tables."""
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
        console.print(table.rich())
    console.print(f"written: {output}", soft_wrap=True)
    return result


def train_and_evaluate(name: str, settings: TrainSettings) -> dict[str, Any] | None:
    """Run a protocol that trains, in each process; the main process writes the JSON and regenerates the page.

    Returns None on other processes, and if a signal stopped the training; rerun the same command to resume.
    """
    start = time.perf_counter()
    with (
        init_distributed(TrainConfig(device=settings.device, num_threads=settings.num_threads), "--") as dist,
        stop_on_signal() as stop,
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
            "data": {"shards": str(pretrained.shards), "split": pretrained.val},
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


def _write_page(run: Path) -> None:
    _console().print(f"page: {write_report(run)}", soft_wrap=True)


def evaluate_everything(settings: WorldModelSettings) -> None:
    """Run every evaluator. One that is invalid for the run or its data is reported and skipped.

    Raises ConfigError at the end if one was skipped.
    """
    common = {field.name: getattr(settings, field.name) for field in fields(EvalSettings)}
    context, skipped = _load_context(settings), []
    try:
        for name, evaluator in EVALUATORS.items():
            own = evaluator.settings(**common)
            if isinstance(own, MarginalisationSettings):
                own = replace(own, probe=replace(own.probe, label=settings.label))
            elif isinstance(own, KNNSettings):
                own = replace(own, label=settings.label)
            try:
                _evaluate(context, name, own)
            except ConfigError as error:
                print(f"{name}: {error}", file=sys.stderr)
                skipped.append(name)
    finally:
        _write_page(context.run)
    if skipped:
        raise ConfigError(f"skipped, for the reasons above: {', '.join(skipped)}")


def show_tables(runs: Sequence[Path], markdown_file: Path | None = None) -> None:
    """Print the paper's downstream tables with the results of `runs`, and write them to a Markdown file.

    Raises ReportError, which names the folder or file.
    """
    if not runs:
        raise ReportError("--runs: name at least one run folder, for example --runs runs/demo")
    tables = paper_tables(runs)
    for table in tables:
        _console().print(table.rich())
    if markdown_file is not None:
        write_atomically(markdown_file, markdown(tables).encode())
        _console().print(f"written: {markdown_file}", soft_wrap=True)

"""Downstream section of the report: results of each protocol by trial (paper, section 5).

Also the paper's downstream tables with the runs' own results.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from markupsafe import Markup

from iwm.downstream.registry import PROTOCOLS
from iwm.report.components import (
    Cell,
    ChartLine,
    chart_card,
    chart_grid,
    details,
    html_table,
    legend,
    line_chart,
    paragraphs,
    section,
    table,
)
from iwm.report.efficiency import efficiency_of
from iwm.report.paper_tables import paper_tables_of
from iwm.report.results import (
    SEGMENTATION,
    Metric,
    ProtocolResult,
    TrialResult,
    read_dataset_results,
)
from iwm.report.runs import Point, RunResults, read_metrics
from iwm.report.templates import render

MEANING = (
    "Each trial is trained on labelled images and evaluated on held-out images. The score is the top-1 accuracy "
    "(mIoU for segmentation) of the last epoch in % ± standard error over images. The score at the best epoch is on "
    "the same images; each result says on which images that epoch was chosen."
)


def downstream_tables(runs: Sequence[RunResults]) -> Markup:
    """Return the paper's tables with these runs' results; folded for a single run."""
    tables = Markup().join(map(html_table, paper_tables_of(runs)))
    if not tables:
        return Markup()
    return section(
        "The paper's downstream tables", tables if len(runs) > 1 else details("With this run's results", tables)
    )


def downstream_section(run: RunResults) -> Markup:
    """Return accuracy over trained parameters, and each protocol's trials with their learning curves."""
    datasets = read_dataset_results(run)
    if not datasets:
        return Markup()
    records = sorted((record for dataset in datasets for record in dataset.records), key=lambda record: record.name)
    protocols = (_protocol(run, name, [record for record in records if record.protocol == name]) for name in PROTOCOLS)
    return section(
        "Downstream tasks", paragraphs([MEANING], linked=True) + efficiency_of(datasets) + Markup().join(protocols)
    )


# Trials of a protocol


def _protocol(run: RunResults, name: str, records: Sequence[ProtocolResult]) -> Markup:
    """Return a table of each result of a protocol and, folded, their learning curves."""
    if not records:
        return Markup()
    courses = Markup().join(_learning_curve(run, record) for record in records)
    folded = details("Over the epochs", chart_grid(courses)) if courses else Markup()
    trials = Markup().join(map(_trials, records))
    return render("protocol.html", title=PROTOCOLS[name].title, content=trials + folded)


def _trials(record: ProtocolResult) -> Markup:
    """Return a table with one row per trial."""
    metric = "mIoU %" if record.protocol == SEGMENTATION else "top-1 %"
    timed = any(trial.images_per_second is not None for trial in record.trials)
    scores = [f"{task}, {metric}" if task else metric for task in record.tasks]
    columns = ["trial", *scores, "best at epoch", "trained parameters"]
    columns += ["images/s in training"] if timed else []
    rows = [_trial(record, trial, timed) for trial in record.trials]
    return render(
        "trials.html",
        name=_named(record),
        about=_describe(record),
        table=table(columns, rows, f"{PROTOCOLS[record.protocol].title}: {_named(record)}"),
    )


def _named(record: ProtocolResult) -> str:
    return record.data if record.name == record.protocol else f"{record.data} · {record.name}"


def _describe(record: ProtocolResult) -> str:
    tasks = "; ".join(
        (f"{name}: " if name else "")
        + f"{task.classes} classes"
        + ("" if task.chance is None else f", chance (majority class) {_percent(task.chance)} %")
        + f", {task.train_images:,} training and {task.val_images:,} held-out images"
        for name, task in record.tasks.items()
    )
    length = f"{record.steps:,} steps of {record.batch:,} images, {record.epochs:.4g} epochs"
    return f"{tasks}. {length}; {record.choice}. {record.encoder}, {record.checkpoint}."


def _trial(record: ProtocolResult, trial: TrialResult, timed: bool) -> list[Cell | str]:
    skipped = f"{trial.skipped_steps:,} non-finite steps skipped" if trial.skipped_steps else ""
    scores = []
    for task in record.tasks:
        highest = max((other.scores[task].mean for other in record.trials if task in other.scores), default=0.0)
        scores.append(_score(trial.scores.get(task), highest))
    best = f"{_percent(trial.best[0])} at {trial.best[1]:.4g}" if trial.best else ""
    count = "" if trial.parameters is None else f"{trial.parameters:,}"
    rate = "" if trial.images_per_second is None else f"{trial.images_per_second:,.0f}"
    return [Cell(trial.name, note=skipped), *scores, best, count, *([rate] if timed else [])]


def _score(score: Metric | None, highest: float) -> Cell | str:
    """Return a cell with a bar behind its score, scaled to the best trial; `no score` where the trial diverged."""
    if score is None:
        return "no score"
    error = "" if score.error is None else f" ± {100 * score.error:.1f}"
    share = score.mean / highest if highest > 0 else 0.0
    return Cell(f"{100 * score.mean:.1f}", error, share=share)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


# Learning curves


def _learning_curve(run: RunResults, record: ProtocolResult) -> Markup:
    """Return the held-out score over epochs; '' if it was measured only once."""
    metrics = read_metrics(run.folder / "eval" / record.training / "metrics.jsonl")
    lines = [line for name, trials in _by_seed(record).items() if (line := _line(trials, name, record, metrics)).points]
    if not any(len(line.points) > 1 for line in lines):
        return Markup()
    chances = {task.chance for task in record.tasks.values()}
    chance = chances.pop() if len(chances) == 1 else None
    level = None if chance is None else ("chance", 100 * chance)
    metric = "mIoU" if record.protocol == SEGMENTATION else "accuracy"
    remarks = ["mean over tasks"] if len(record.tasks) > 1 else []
    remarks += ["mean and standard deviation over seeds"] if any(line.spread for line in lines) else []
    title = f"{_named(record)}: {', '.join([metric, *remarks])}"
    marks = legend([line.name for line in lines]) if len(lines) > 1 else Markup()
    return chart_card(title, line_chart(lines, level, x_title="epoch", y_title=f"{metric}, %"), keys=marks)


def _by_seed(record: ProtocolResult) -> dict[str, list[TrialResult]]:
    """Group trials that differ only in their seed, by common name."""
    groups: dict[str, list[TrialResult]] = {}
    for trial in record.trials:
        groups.setdefault(repr((sorted(trial.settings.items()), sorted(trial.scores))), []).append(trial)
    named = {}
    for trials in groups.values():
        name = trials[0].name
        if len(trials) > 1:
            name = name.removesuffix(f"seed {trials[0].seed}").rstrip(", ") or "all"
        named[name] = trials
    return named


def _line(
    trials: Sequence[TrialResult], name: str, record: ProtocolResult, metrics: dict[str, list[Point]]
) -> ChartLine:
    """Return the mean over seeds, by epoch."""
    alone = len(record.trials) == 1
    curves = [dict(metrics.get(record.metric if alone else f"{record.metric}/{trial.name}", [])) for trial in trials]
    steps = sorted(set(curves[0]).intersection(*curves[1:]))
    values = [[100 * curve[step] for curve in curves] for step in steps]
    epochs = [step * record.epochs / record.steps for step in steps]
    spread = [statistics.stdev(row) for row in values] if len(trials) > 1 else []
    return ChartLine(name, [(epoch, statistics.mean(row)) for epoch, row in zip(epochs, values, strict=True)], spread)

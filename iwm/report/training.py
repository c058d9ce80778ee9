"""Training sections of the report: metrics over steps, configurations, settings and versions of evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from iwm.evaluation.result_table import ResultTable
from iwm.report.components import ChartLine, chart_grid, details, html_table, legend, line_chart, number, section
from iwm.report.runs import Point, RunResults, SeedGroup, differing_fields, group_by_seed

CHARTS = {
    "Loss": ("loss",),
    "MRR, small bank": ("mrr_pooled", "mrr_per_token", "mrr_shuffled"),
    "RankMe": ("rankme",),
    "Feature standard deviation": ("feature_std",),
    "Images/s": ("images_per_second",),
    "Data wait, share of time": ("data_wait",),
    "Learning rate": ("lr",),
}
"""Charts by title, with their fields of metrics.jsonl. A comparison draws the first field. Each other field has its
own folded chart."""

CHANCE = "mrr_chance"
"""Field drawn as a reference level in the chart of MRR."""

FROM_ZERO = ("Images/s",)
"""Charts whose value axis always starts at 0."""

SEEDS = "<p>Each line is the mean over runs that differ only in their seed, at the steps that all of them have.</p>"


def curves(runs: Sequence[RunResults]) -> str:
    """Return charts of all metrics over steps."""
    compared = group_by_seed(runs)
    several = len(runs) > 1
    fields = sorted({name for run in runs for name in run.metrics})
    if not fields:
        return ""
    shown = {title: names[:1] if several else names for title, names in CHARTS.items()}
    drawn = {CHANCE, *(name for names in shown.values() for name in names)}
    others = {name.replace("_", " "): (name,) for name in fields if name not in drawn}
    marks = ""
    if several:
        marks = legend([group.name for group in compared])
        marks += SEEDS if any(len(group.runs) > 1 for group in compared) else ""
    charts = "".join(_chart(compared, *chart) for chart in shown.items())
    folded = details(
        "All other metrics", marks + chart_grid("".join(_chart(compared, *chart) for chart in others.items()))
    )
    return section("Training", marks + chart_grid(charts) + (folded if others else ""))


def _chart(compared: Sequence[SeedGroup], title: str, names: tuple[str, ...]) -> str:
    """Draw one line per field of a single run, or per seed group; a group without the field still takes its colour."""
    several = len(compared) > 1 or len(compared[0].runs) > 1
    lines = [
        ChartLine(
            group.name if several else name.replace("_", " "), mean([run.metrics.get(name, []) for run in group.runs])
        )
        for group in compared
        for name in names
    ]
    filled = [line for line in lines if line.points]
    if not filled:
        return ""
    marks = legend([line.name for line in filled]) if not several and len(filled) > 1 else ""
    chance = [run.metrics[CHANCE][-1][1] for group in compared for run in group.runs if CHANCE in run.metrics]
    # Banks of different sizes have different chance levels: then no level is drawn.
    level = ("chance", chance[0]) if "mrr_pooled" in names and len(set(chance)) == 1 else None
    svg = line_chart(lines if several else filled, level, from_zero=title in FROM_ZERO)
    last = "" if several else f"<b>{number(filled[0].points[-1][1])}</b>"
    return f'<div class="chart"><h3>{title}{last}</h3>{marks}{svg}</div>'


def mean(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the mean of several curves at their common steps."""
    values = [dict(curve) for curve in curves]
    shared = set(values[0]).intersection(*values[1:])
    return [(step, sum(curve[step] for curve in values) / len(values)) for step in sorted(shared)]


PROVENANCE = ("checkpoint", "data", "settings", "seed", "device", "precision", "versions", "seconds")
"""Fields of an evaluation for reproducing it."""


def configuration(runs: Sequence[RunResults]) -> str:
    """Return the differences of runs and, folded, the resolved configuration and versions of each run."""
    if len(runs) == 1:
        content = _of_one(runs[0])
    else:
        contents = ((run.name, _of_one(run)) for run in runs)
        folded = "".join(details(name, text) for name, text in contents if text)
        content = _differences(runs) + (details("All fields of each run", folded) if folded else "")
    return section("Configuration", content) if content else ""


def _of_one(run: RunResults) -> str:
    parts = []
    if run.config is not None:
        parts.append(details("config.yaml", f"<pre>{escape(run.config)}</pre>"))
    for name, result in run.evaluations.items():
        provenance = json.dumps({key: result[key] for key in PROVENANCE if key in result}, indent=1)
        parts.append(details(f"Evaluation {name}: settings and versions", f"<pre>{escape(provenance)}</pre>"))
    return "".join(parts)


def _differences(runs: Sequence[RunResults]) -> str:
    """Return a table of configuration fields and versions that differ, with one column per run."""
    fields = differing_fields(runs) | _versions(runs)
    if not fields:
        return "<p>The configurations do not differ.</p>"
    rows = [[name, *map(_plain, values)] for name, values in fields.items()]
    return html_table(ResultTable("Differing fields", ["field", *(run.name for run in runs)], rows))


def _versions(runs: Sequence[RunResults]) -> dict[str, list[Any]]:
    """Return the package versions of evaluations that differ between runs."""
    by_run = []
    for run in runs:
        merged: dict[str, set[str]] = {}
        for result in run.evaluations.values():
            for package, version in result.get("versions", {}).items():
                merged.setdefault(package, set()).add(version)
        by_run.append({package: ", ".join(sorted(versions)) for package, versions in merged.items()})
    packages = {package: None for versions in by_run for package in versions}
    columns = {f"version of {package}": [versions.get(package) for versions in by_run] for package in packages}
    return {name: values for name, values in columns.items() if len({v for v in values if v is not None}) > 1}


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)

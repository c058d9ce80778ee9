"""Section of the page on inferred actions: inferred over true values, tables of scores, and a figure of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, pstdev
from typing import Any

from markupsafe import Markup

from dali_pipelines.augmentations import OP_BY_NAME
from iwm.evaluation.action_tables import TITLES as KINDS
from iwm.report.components import (
    ChartLine,
    chart_card,
    chart_grid,
    details,
    html_table,
    legend,
    line_chart,
    paragraphs,
    stored_tables,
)
from iwm.report.evaluator_sections import evaluator_section
from iwm.report.picture_grid import figures
from iwm.report.runs import Point, RunResults

BINS = 8
"""Largest number of groups of pairs along the true value; each has about as many pairs."""

MEANING = (
    "The action that leads from a source to a target, found by a search that makes the distance between the prediction "
    "and the target's features small. In the charts: inferred over true change, mean over pairs with similar true "
    "values; the band is one standard deviation. Control: the search through a predictor trained with shuffled "
    "actions. Above each chart: the rank correlation of the search."
)


def inferred_actions(run: RunResults) -> Markup:
    """Return the charts, tables and figure of inferred actions; '' where there is no result."""
    return evaluator_section(run, "infer-action", _content)


def _content(run: RunResults, result: dict[str, Any]) -> Markup:
    main = result["search"][0]
    names = [name for name in (main, "regressor", "control") if _has(result, name)]
    charts = Markup().join(
        _charts(f"{KINDS[kind].capitalize()}", record, names, main) for kind, record in result["kinds"].items()
    )
    first, *others = map(html_table, stored_tables(result))
    more = details("All scores", Markup().join(others)) if others else Markup()
    return paragraphs([MEANING], linked=True) + legend(names) + charts + first + more + figures(run, result)


def _has(result: dict[str, Any], method: str) -> bool:
    return all(method in record["methods"] for record in result["kinds"].values())


def _charts(title: str, record: dict[str, Any], names: Sequence[str], main: str) -> Markup:
    """Return a chart for each parameter of one kind of pairs."""
    cards = []
    for name, scores in record["methods"][main]["parameters"].items():
        values = record["values"]["entries"][name]
        lines = [_line(method, values["true"], values[method]) for method in names]
        unit = OP_BY_NAME[name].unit
        words = f"change, {unit}" if unit else "change"
        chart = line_chart(lines, x_title=f"true {words}", y_title=f"inferred {words}", diagonal="ideal")
        correlation = scores["correlation"]["mean"]
        cards.append(chart_card(f"{title}: {name}", chart, value=f"correlation {correlation:.2f}"))
    return chart_grid(Markup().join(cards)) if cards else Markup()


def _line(name: str, true: Sequence[float], found: Sequence[float]) -> ChartLine:
    """Return the mean of the found values, and their deviation, in groups of pairs with similar true values."""
    pairs = sorted(zip(true, found, strict=True))
    groups = min(BINS, len(pairs))
    points: list[Point] = []
    spread = []
    for i in range(groups):
        group = pairs[i * len(pairs) // groups : (i + 1) * len(pairs) // groups]
        points.append((mean(x for x, _ in group), mean(y for _, y in group)))
        spread.append(pstdev(y for _, y in group))
    return ChartLine(name, points, spread)

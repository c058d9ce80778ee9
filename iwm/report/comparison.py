"""Comparison of several runs: scores with their spread over seeds, and a sortable table with links to the runs."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from iwm.evaluation.result_table import format_mean_stderr
from iwm.evaluation.settings import DISTANCES
from iwm.report.axes import number
from iwm.report.components import Cell, SpreadRow, chart_card, chart_grid, paragraphs, section, spread_chart, table
from iwm.report.runs import RunResults, SeedGroup, group_by_seed
from iwm.report.summary import main_mrr, speed

HEAD = ("run", "MRR, pooled", "per token", "shuffled actions", "chance", "loss", "steps", "images/s")

MEANING = (
    "Each point is a run; runs that differ only in their seed share a row. The bar is their range, the stroke and the "
    "number at the right are their mean."
)


def comparison(runs: Sequence[RunResults], folder: Path) -> Markup:
    """Return scores by group of seeds, and a table with one row per run; '' for a single run.

    folder: folder of the page, from which runs are linked.
    """
    if len(runs) == 1:
        return Markup()
    groups, name = group_by_seed(runs), main_mrr(runs)
    figure = _figure(groups, name)
    about = paragraphs([*_best(groups, name), MEANING], linked=True) if figure else Markup()
    hint = paragraphs(["Press a column's head to sort by it; a run's name leads to its own page, where it has one."])
    return section("Comparison", about + figure + hint + _table(runs, folder))


def _best(groups: Sequence[SeedGroup], name: str | None) -> list[str]:
    """Return a sentence on the group with the highest mean MRR, pooled, and whether it overlaps the next one.

    Empty where fewer than two groups were evaluated, or on different banks.
    """
    results = {group.name: [run.evaluations[name] for run in group.runs if name in run.evaluations] for group in groups}
    chances = {result["chance"] for of_group in results.values() for result in of_group}
    scores = {group: list(map(_pooled, of_group)) for group, of_group in results.items() if of_group}
    if len(scores) < 2 or len(chances) > 1:
        return []
    (first, best), (second, following) = sorted(scores.items(), key=lambda pair: -statistics.mean(pair[1]))[:2]
    apart = min(best) > max(following)
    relation = "all of its runs lie above" if apart else "its runs do not all lie above"
    return [
        f"Highest MRR: {first}, {_range(best)}, chance {chances.pop():.3f}; {relation} those of the next, {second}, "
        f"{_range(following)}."
    ]


def _range(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"mean {mean} ({min(values):.3f} to {max(values):.3f})"


def _pooled(result: dict[str, Any]) -> float:
    mean: float = result["mrr"]["pooled"]["teacher"]["mean"]
    return mean


def _figure(groups: Sequence[SeedGroup], name: str | None) -> Markup:
    """Return a chart of each score that a run has: MRR pooled and per token, the control, the last loss."""
    charts = []
    results = [[run.evaluations[name] for run in group.runs if name in run.evaluations] for group in groups]
    flat = [result for group in results for result in group]
    chances = {result["chance"] for result in flat}
    # Banks of different sizes have different chance levels: then no level is drawn.
    chance = ("chance", chances.pop()) if len(chances) == 1 else None
    readers: dict[str, Callable[[dict[str, Any]], float]] = {
        "MRR, pooled": _pooled,
        "MRR, per token": lambda result: result["mrr"]["per_token"]["teacher"]["mean"],
        "MRR with shuffled actions": lambda result: result["shuffled_actions"]["pooled"]["teacher"]["mean"],
    }
    for title, read in readers.items() if flat else ():
        rows = [
            SpreadRow(group.name, [read(result) for result in of_group])
            for group, of_group in zip(groups, results, strict=True)
        ]
        charts.append(chart_card(title, spread_chart(rows, "MRR, 0 to 1", chance)))
    losses = [[run.metrics["loss"][-1][1] for run in group.runs if "loss" in run.metrics] for group in groups]
    if any(losses):
        rows = [SpreadRow(group.name, values) for group, values in zip(groups, losses, strict=True)]
        charts.append(chart_card("Last loss", spread_chart(rows, "loss; comparable only for equal targets")))
    return chart_grid(Markup().join(charts)) if charts else Markup()


def _table(runs: Sequence[RunResults], folder: Path) -> Markup:
    """Return one row per run: scores, length, speed; the bar behind a score is scaled to the best run."""
    name = main_mrr(runs)
    results = {run.name: run.evaluations[name] for run in runs if name in run.evaluations}
    best = max(map(_pooled, results.values()), default=1.0)
    rows = []
    for run in runs:
        result, loss, images_per_second = results.get(run.name), run.metrics.get("loss"), speed(run)
        rows.append(
            [
                Cell(run.name, href=_own_page(run, folder)),
                *(_scores(result, best) if result else [Cell("")] * 4),
                *([_plain(loss[-1][1]), Cell(f"{loss[-1][0]:,.0f}", value=loss[-1][0])] if loss else [Cell("")] * 2),
                Cell("") if images_per_second is None else _plain(round(images_per_second)),
            ]
        )
    return table(HEAD, rows, "Scores of all runs", sortable=True)


def _own_page(run: RunResults, folder: Path) -> str:
    """Return the address of RUN/report.html relative to `folder`; '' where there is none."""
    page = run.folder / "report.html"
    return quote(Path(os.path.relpath(page.resolve(), folder.resolve())).as_posix()) if page.exists() else ""


def _scores(result: dict[str, Any], best: float) -> list[Cell]:
    pooled, per_token = (result["mrr"][distance]["teacher"] for distance in DISTANCES)
    share = pooled["mean"] / best if best > 0 else 0.0
    return [
        _bold(pooled, share),
        _bold(per_token),
        _bold(result["shuffled_actions"]["pooled"]["teacher"]),
        Cell(f"{result['chance']:.3f}", value=result["chance"]),
    ]


def _bold(score: dict[str, float], share: float | None = None) -> Cell:
    mean, error = format_mean_stderr(score).split("±")
    return Cell(mean, f" ± {error}", share=share, value=score["mean"])


def _plain(value: float) -> Cell:
    return Cell(number(value), value=value)

"""Section of the report on MRR against accuracy (figure 4): which protocol suits invariant and equivariant models.

Ours is a point for each group of runs that differ only in their seed; the paper's are the twelve rows of table S2.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from iwm.downstream.registry import PROTOCOLS
from iwm.evaluation.paper_results import TABLE_S2
from iwm.evaluation.result_table import ResultTable
from iwm.evaluation.settings import bank_augmentation
from iwm.report.components import (
    ChartLine,
    chart_card,
    chart_grid,
    details,
    html_table,
    legend,
    line_chart,
    paragraphs,
    section,
    unjoined,
)
from iwm.report.results import TrialResult, best_trials, read_dataset_results
from iwm.report.runs import RunResults, group_by_seed
from iwm.report.table_text import percent
from iwm.report.trial_selection import finetunes, is_plain

ACCURACIES: Mapping[str, Literal["linear", "attentive", "predictor_finetuning"]] = {
    "linear": "linear",
    "attentive": "attentive",
    "finetune-predictor": "predictor_finetuning",
}
"""Column of table S2 by protocol."""

FEWEST = 3
"""Smallest number of points with a correlation."""

MEANING = (
    "Each point is a model: runs that differ only in their seed are one, at their means. MRR is pooled, on a bank of "
    "the run's own jitter. In the paper invariant models (low MRR) suit linear probes, equivariant ones predictor "
    "finetuning. The paper's accuracies are on ImageNet after 300 epochs of pretraining: compare the slopes."
)


@dataclass(frozen=True)
class EquivariancePoint:
    """Mean reciprocal rank of a model, and its accuracies in percent by protocol."""

    name: str
    mrr: float
    accuracies: Mapping[str, float]


def paper_points() -> list[EquivariancePoint]:
    """Return the paper's twelve models."""
    return [
        EquivariancePoint(
            f"{depth} blocks, {scenario}", row["mrr"], {name: row[column] for name, column in ACCURACIES.items()}
        )
        for (depth, scenario), row in TABLE_S2.items()
    ]


def correlations(points: Sequence[EquivariancePoint], protocols: Sequence[str]) -> dict[str, float | None]:
    """Return Pearson's correlation of MRR and accuracy by protocol of figure 4.

    None for fewer than three points, and where one of both is the same for all points.
    """
    found: dict[str, float | None] = {}
    for name in protocols:
        if name in ACCURACIES:
            pairs = [(point.mrr, point.accuracies[name]) for point in points if name in point.accuracies]
            varied = len(pairs) >= FEWEST and all(len(set(values)) > 1 for values in zip(*pairs, strict=True))
            found[name] = statistics.correlation(*zip(*pairs, strict=True)) if varied else None
    return found


def correlation_table(ours: Sequence[EquivariancePoint], protocols: Sequence[str]) -> ResultTable | None:
    """Return the correlations of ours and of the paper's points; None without a protocol of figure 4."""
    shown = [name for name in protocols if name in ACCURACIES]
    if not shown:
        return None
    columns = ["", *(PROTOCOLS[name].title for name in shown)]
    rows = [
        [f"{who}, {len(points)} models", *map(_signed, correlations(points, shown).values())]
        for who, points in (("ours", ours), ("paper", paper_points()))
    ]
    caption = f"Pearson's correlation over models; – for fewer than {FEWEST} models."
    return ResultTable("Figure 4: correlation of MRR and accuracy", columns, rows, caption)


def equivariance(runs: Sequence[RunResults]) -> Markup:
    """Return charts of accuracy over MRR for each data set; '' for a single run and without results."""
    if len(runs) == 1:
        return Markup()
    by_data = _points(runs)
    charts = Markup().join(_charts(data, points) for data, points in by_data.items())
    if not charts:
        return Markup()
    return section("MRR and accuracy (figure 4)", paragraphs([MEANING], linked=True) + charts)


def _charts(data: str, ours: Sequence[EquivariancePoint]) -> Markup:
    paper = paper_points()
    shown = [name for name in ACCURACIES if any(name in point.accuracies for point in ours)]
    cards = [_card(f"{PROTOCOLS[name].title}: {data}", name, ours, paper) for name in shown]
    rows = [
        [f"{who}: {point.name}", f"{point.mrr:.3f}", *(percent(point.accuracies.get(name)) for name in shown)]
        for who, points in (("ours", ours), ("paper", paper))
        for point in points
    ]
    table = ResultTable(
        f"Points of the charts: {data}", ["", "MRR", *(f"{PROTOCOLS[name].title}, %" for name in shown)], rows
    )
    return chart_grid(Markup().join(cards)) + details("The points as a table", html_table(table))


def _card(title: str, protocol: str, ours: Sequence[EquivariancePoint], paper: Sequence[EquivariancePoint]) -> Markup:
    lines = [_line("ours", ours, protocol), _line("paper", paper, protocol)]
    chart = line_chart(lines, x_range=(0.0, 1.0), x_title="MRR, 0 to 1", y_title="top-1 accuracy, %")
    values = [correlations(points, [protocol])[protocol] for points in (ours, paper)]
    words = [
        f"{line.name} {_signed(value)} ({len(line.points)} models)" for line, value in zip(lines, values, strict=True)
    ]
    note = f"Pearson's r with MRR: {', '.join(words)}."
    return chart_card(title, chart, keys=legend([line.name for line in lines], joined=False), note=note)


def _line(name: str, points: Sequence[EquivariancePoint], protocol: str) -> ChartLine:
    known = [point for point in points if protocol in point.accuracies]
    return unjoined(name, [(point.name, point.mrr, point.accuracies[protocol]) for point in known])


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


# Points of runs


def _points(runs: Sequence[RunResults]) -> dict[str, list[EquivariancePoint]]:
    """Return the models with an MRR and an accuracy, by data set of the accuracy."""
    found: dict[str, list[EquivariancePoint]] = {}
    for group in group_by_seed(runs):
        ranks = [rank for run in group.runs if (rank := own_mrr(run)) is not None]
        scores: dict[str, dict[str, list[float]]] = {}
        for run in group.runs:
            for dataset in read_dataset_results(run):
                for name in ACCURACIES:
                    best = best_trials(dataset.records, name, _selects(name))
                    if best is not None:
                        scores.setdefault(dataset.data, {}).setdefault(name, []).append(100 * best.mean)
        for data, values in scores.items():
            if ranks:
                means = {name: statistics.mean(each) for name, each in values.items()}
                found.setdefault(data, []).append(EquivariancePoint(group.name, statistics.mean(ranks), means))
    return found


def _selects(protocol: str) -> Callable[[TrialResult], bool]:
    return finetunes("pretrained") if protocol == "finetune-predictor" else is_plain


def own_mrr(run: RunResults) -> float | None:
    """Return the pooled MRR on a bank of the run's own jitter; None where there is none.

    A bank of another scenario with the same jitter counts too. Of several banks the first by file name is taken, `mrr`
    before all others.
    """
    config = run.parse_config()
    found = run.evaluations_of("mrr")
    for name in sorted(found, key=lambda name: (name != "mrr", name)):
        settings = found[name].get("settings", {})
        scenario = settings.get("bank", {}).get("scenario")
        own = scenario is None or (
            config is not None and bank_augmentation(config.views, scenario) == bank_augmentation(config.views)
        )
        computed = settings.get("jitter_impl")
        if own and (computed is None or (config is not None and computed == config.views.jitter_impl)):
            mean: float = found[name]["mrr"]["pooled"]["teacher"]["mean"]
            return mean
    return None

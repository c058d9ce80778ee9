"""How training went: every metric over the steps; of several runs, one line per arm."""

from __future__ import annotations

from collections.abc import Sequence

from iwm.report.chart import Line, legend, line_chart, number
from iwm.report.comparison import Arm, arms
from iwm.report.markup import details, grid, section
from iwm.report.run_folder import Point, Run

CHARTS = {
    "Loss": ("loss",),
    "MRR, small bank": ("mrr_pooled", "mrr_per_token", "mrr_shuffled"),
    "RankMe": ("rankme",),
    "Feature standard deviation": ("feature_std",),
    "Images/s": ("images_per_second",),
    "Data wait, share of the time": ("data_wait",),
    "Learning rate": ("lr",),
}
"""Charts in their order: title and fields of metrics.jsonl, of which a comparison draws the first. Other fields get a
chart of their own, folded away."""

CHANCE = "mrr_chance"
"""The field that is drawn as a level in the chart of MRR."""

FROM_ZERO = ("Images/s",)
"""Charts whose value axis starts at 0 however little the values vary."""

SEEDS = "<p>Each line is the mean of an arm's seeds, over the steps that all of them have.</p>"


def curves(runs: Sequence[Run]) -> str:
    """Every metric over the steps."""
    compared = arms(runs)
    several = len(runs) > 1
    fields = sorted({name for run in runs for name in run.metrics})
    if not fields:
        return ""
    shown = {title: names[:1] if several else names for title, names in CHARTS.items()}
    drawn = {CHANCE, *(name for names in shown.values() for name in names)}
    others = {name.replace("_", " "): (name,) for name in fields if name not in drawn}
    marks = ""
    if several:
        marks = legend([arm.name for arm in compared])
        marks += SEEDS if any(len(arm.runs) > 1 for arm in compared) else ""
    charts = "".join(_chart(compared, *each) for each in shown.items())
    folded = details("All other metrics", marks + grid("".join(_chart(compared, *each) for each in others.items())))
    return section("Training", marks + grid(charts) + (folded if others else ""))


def _chart(compared: Sequence[Arm], title: str, names: tuple[str, ...]) -> str:
    """One line per field of one run, or per arm of several; an arm that lacks the field keeps its place and colour."""
    several = len(compared) > 1 or len(compared[0].runs) > 1
    lines = [
        Line(arm.name if several else name.replace("_", " "), mean([run.metrics.get(name, []) for run in arm.runs]))
        for arm in compared
        for name in names
    ]
    filled = [line for line in lines if line.points]
    if not filled:
        return ""
    marks = legend([line.name for line in filled]) if not several and len(filled) > 1 else ""
    chance = [run.metrics[CHANCE][-1][1] for arm in compared for run in arm.runs if CHANCE in run.metrics]
    # Banks of several sizes have several chances: then no one level is drawn.
    level = ("chance", chance[0]) if "mrr_pooled" in names and len(set(chance)) == 1 else None
    svg = line_chart(lines if several else filled, level, from_zero=title in FROM_ZERO)
    last = "" if several else f"<b>{number(filled[0].points[-1][1])}</b>"
    return f'<div class="chart"><h3>{title}{last}</h3>{marks}{svg}</div>'


def mean(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of several curves over the steps that all of them have."""
    values = [dict(curve) for curve in curves]
    shared = set(values[0]).intersection(*values[1:])
    return [(step, sum(each[step] for each in values) / len(values)) for step in sorted(shared)]

"""How training went: every metric over the steps."""

from __future__ import annotations

from html import escape

from iwm.report.chart import Line, line_chart, number
from iwm.report.markup import details, grid, section
from iwm.report.run_folder import Run

CHARTS = {
    "Loss": ("loss",),
    "MRR, small bank": ("mrr_pooled", "mrr_per_token", "mrr_shuffled"),
    "RankMe": ("rankme",),
    "Feature standard deviation": ("feature_std",),
    "Images/s": ("images_per_second",),
    "Data wait, share of the time": ("data_wait",),
    "Learning rate": ("lr",),
}
"""Charts in their order: title and fields of metrics.jsonl. Other fields get a chart of their own, folded away."""

CHANCE = "mrr_chance"
"""The field that is drawn as a level in the chart of MRR."""

FROM_ZERO = ("Images/s",)
"""Charts whose value axis starts at 0 however little the values vary."""


def curves(run: Run) -> str:
    """Every metric over the steps."""
    if not run.metrics:
        return ""
    named = {CHANCE, *(name for names in CHARTS.values() for name in names)}
    others = {name.replace("_", " "): (name,) for name in sorted(run.metrics) if name not in named}
    shown = "".join(_chart(run, title, names) for title, names in CHARTS.items())
    folded = details("All other metrics", grid("".join(_chart(run, *each) for each in others.items())))
    return section("Training", grid(shown) + (folded if others else ""))


def _chart(run: Run, title: str, names: tuple[str, ...]) -> str:
    lines = [Line(name.replace("_", " "), run.metrics[name]) for name in names if name in run.metrics]
    if not lines:
        return ""
    marks = "".join(f'<span><i class="s{i}"></i>{escape(line.name)}</span>' for i, line in enumerate(lines, start=1))
    legend = f'<div class="legend">{marks}</div>' if len(lines) > 1 else ""
    level = ("chance", run.metrics[CHANCE][-1][1]) if "mrr_pooled" in names and CHANCE in run.metrics else None
    svg = line_chart(lines, level, from_zero=title in FROM_ZERO)
    last = number(lines[0].points[-1][1])
    return f'<div class="chart"><h3>{escape(title)}<b>{last}</b></h3>{legend}{svg}</div>'

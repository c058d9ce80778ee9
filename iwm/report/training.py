"""Training section of the report: metrics over steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from iwm.report.axes import number
from iwm.report.components import ChartLine, chart_card, chart_grid, details, legend, line_chart, paragraphs, section
from iwm.report.runs import Point, RunResults, SeedGroup, group_by_seed


@dataclass(frozen=True)
class MetricChart:
    """Chart of one or several fields of metrics.jsonl. A comparison draws the first field."""

    title: str
    fields: tuple[str, ...]
    unit: str = ""
    """Title of the value axis."""
    top: float | None = None
    """End of the value axis, 1 for a share; larger values extend it."""
    from_zero: bool = True
    note: str = ""


LOSS_NOTE = (
    "A loss that rises is not yet a failure: the targets are features of the teacher, which learns too, and richer "
    "features are harder to predict. MRR, RankMe and feature standard deviation show whether the model improves."
)

CHARTS = (
    MetricChart("Loss", ("loss",), "distance of prediction and target", note=LOSS_NOTE),
    MetricChart("MRR, small bank", ("mrr_pooled", "mrr_per_token", "mrr_shuffled"), "MRR, 0 to 1"),
    MetricChart("RankMe", ("rankme",), "effective dimensions"),
    MetricChart("Feature standard deviation", ("feature_std",), "standard deviation; 0 is collapse"),
    MetricChart("Images/s", ("images_per_second",), "images per second"),
    MetricChart("Data wait", ("data_wait",), "share of time, 0 to 1", top=1.0),
    MetricChart("Learning rate", ("lr",), "learning rate"),
)

FOLDED = (
    MetricChart("Gradient norm", ("gradient_norm",), "norm before clipping"),
    MetricChart("MFU", ("mfu",), "share of the device's speed, 0 to 1", top=1.0),
    MetricChart("Memory", ("memory_gib",), "peak, GiB"),
    MetricChart("Checkpoint pause", ("checkpoint_pause",), "seconds per checkpoint"),
    MetricChart("Skipped steps", ("skipped",), "steps since the start"),
    MetricChart("Weight decay", ("weight_decay",), "weight decay"),
    MetricChart("EMA", ("ema",), "share of the teacher that is kept", from_zero=False, note="The axis is cut."),
    MetricChart("Images seen", ("samples",), "images"),
    MetricChart("Epochs", ("epoch",), "epochs"),
)
"""Charts that are folded. Every other field of metrics.jsonl has a folded chart too, titled by its name."""

CHANCE = "mrr_chance"
"""Field drawn as a reference level in the chart of MRR."""

SEEDS = "Each line is the mean over runs that differ only in their seed, at the steps that all of them have."

HINT = "Point at a chart, or select it and press an arrow key, to read its values."


def curves(runs: Sequence[RunResults]) -> Markup:
    """Return charts of all metrics over steps, and remarks on steps and values that were not finite."""
    compared = group_by_seed(runs)
    several = len(runs) > 1
    fields = sorted({name for run in runs for name in run.metrics})
    if not fields:
        return Markup()
    named = {name for chart in (*CHARTS, *FOLDED) for name in (chart.fields[:1] if several else chart.fields)}
    others = [MetricChart(name.replace("_", " "), (name,)) for name in fields if name not in named | {CHANCE}]
    marks = Markup()
    if several:
        marks = legend([group.name for group in compared])
        marks += paragraphs([SEEDS] if any(len(group.runs) > 1 for group in compared) else [])
    shown = _charts(compared, CHARTS)
    folded = _charts(compared, (*FOLDED, *others))
    more = details("All other metrics", marks + folded) if folded else Markup()
    return section("Training", paragraphs([*_failures(runs), HINT], linked=True) + marks + shown + more)


def _charts(compared: Sequence[SeedGroup], charts: Sequence[MetricChart]) -> Markup:
    drawn = Markup().join(_chart(compared, chart) for chart in charts)
    return chart_grid(drawn) if drawn else Markup()


def _failures(runs: Sequence[RunResults]) -> list[str]:
    """Return a sentence on skipped steps and one on values that were not finite, where a run has such."""
    skipped, not_finite = [], []
    for run in runs:
        of_run = f" in {run.name}" if len(runs) > 1 else ""
        step, count = run.metrics.get("skipped", [(0.0, 0.0)])[-1]
        if count:
            skipped.append(f"{count:,.0f} of {step:,.0f}{of_run}")
        if run.not_finite:
            fields = ", ".join(
                f"{name} ({count} value{'s' if count > 1 else ''})" for name, count in run.not_finite.items()
            )
            not_finite.append(f"{fields}{of_run}")
    found = {"Skipped steps": skipped, "Values that were not finite, and are not drawn": not_finite}
    return [f"{name}: {'; '.join(parts)}." for name, parts in found.items() if parts]


def _chart(compared: Sequence[SeedGroup], chart: MetricChart) -> Markup:
    """Draw one line per field of a single run, or per seed group; a group without the field still takes its colour."""
    several = len(compared) > 1 or len(compared[0].runs) > 1
    lines = [
        ChartLine(
            group.name if several else name.replace("_", " "), mean([run.metrics.get(name, []) for run in group.runs])
        )
        for group in compared
        for name in (chart.fields[:1] if several else chart.fields)
    ]
    filled = [line for line in lines if line.points]
    if not filled:
        return Markup()
    chance = [run.metrics[CHANCE][-1][1] for group in compared for run in group.runs if CHANCE in run.metrics]
    # Banks of different sizes have different chance levels: then no level is drawn.
    level = ("chance", chance[0]) if "mrr_pooled" in chart.fields and len(set(chance)) == 1 else None
    svg = line_chart(
        lines if several else filled,
        level,
        from_zero=chart.from_zero,
        top=chart.top,
        x_range=(0, max(points[-1][0] for group in compared for run in group.runs for points in run.metrics.values())),
        x_title="step",
        y_title=chart.unit,
    )
    keys = legend([line.name for line in filled]) if not several and len(filled) > 1 else Markup()
    last = "" if several else number(filled[0].points[-1][1])
    return chart_card(chart.title, svg, value=last, keys=keys, note=chart.note)


def mean(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the mean of several curves at their common steps."""
    values = [dict(curve) for curve in curves]
    shared = set(values[0]).intersection(*values[1:])
    return [(step, sum(curve[step] for curve in values) / len(values)) for step in sorted(shared)]

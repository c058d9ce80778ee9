"""Charts of the page as inline SVG: lines, named points, spread over seeds, legends. Drawn by templates/charts.html.

Lines and points differ in colour, dash and marker, so that no pair of up to 12 is told apart by colour alone. The
page's script shows their values on hover and by keyboard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from iwm.report.axes import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, exact, fit_axes, number, ticks
from iwm.report.runs import Point
from iwm.report.templates import call

TEMPLATE = "charts.html"
MOST_POINTS = 300
"""Largest number of points of a drawn line."""
COLOURS, DASHES, MARKERS = 8, 3, 4
"""Numbers of colours (s1 to s8), dashes (d0 to d2) and marker shapes. A line's colour, dash and marker are those of its
place in the chart."""
MARKED = 5
"""Number of markers along a line, where there are several lines."""
FEW_POINTS = 2
"""Largest number of points that are drawn with their values instead of a line: a line would suggest a course."""
LINE = 12
"""Height of a line of text (SVG units)."""


@dataclass(frozen=True)
class ChartLine:
    """One curve; points are (x, value) with rising x, all finite."""

    name: str
    points: Sequence[Point]
    spread: Sequence[float] = ()
    """Half the height of a band around the line, one value per point, or empty. A line with a band is not thinned."""
    joined: bool = True
    """False for points that no line joins, such as runs; they may have equal x, and have no band."""
    point_names: Sequence[str] = ()
    """Name of each point for its reading, or empty."""


def unjoined(name: str, points: Sequence[tuple[str, float, float]]) -> ChartLine:
    """Return points that no line joins, each given as its name, x and value."""
    ordered = sorted(points, key=lambda point: point[1])
    places, names = [(x, y) for _, x, y in ordered], [each for each, *_ in ordered]
    return ChartLine(name, places, joined=False, point_names=names)


@dataclass(frozen=True)
class ChartMark:
    """One named point; `half` is half the length of its error bar (0: none)."""

    name: str
    x: float
    y: float
    half: float = 0.0


@dataclass(frozen=True)
class SpreadRow:
    """Values of one group of runs, one per seed; empty where none has a value."""

    name: str
    values: Sequence[float]


def line_chart(
    lines: Sequence[ChartLine],
    reference: tuple[str, float] | None = None,
    from_zero: bool = False,
    *,
    top: float | None = None,
    x_range: tuple[float, float] | None = None,
    x_title: str = "",
    y_title: str = "",
    diagonal: str = "",
) -> Markup:
    """Draw lines as SVG. At least one line has points; one without points still takes its colour.

    A line of at most FEW_POINTS points is drawn as points with their values, unless it is not joined. Curves of more
    than MOST_POINTS points are averaged over equal intervals. reference: named level such as chance. diagonal: name of
    the line y = x, '' for none. from_zero, top, x_range: see `fit_axes`.
    """
    curves = [line if line.spread or not line.joined else replace(line, points=_thin(line.points)) for line in lines]
    xs = [x for line in curves for x, _ in line.points]
    ys = [y for line in curves for _, y in (*line.points, *_edge(line))] + ([reference[1]] if reference else [])
    axes = fit_axes(xs, ys, from_zero=from_zero, top=top, x_range=x_range, x_title=x_title, y_title=y_title)
    drawn = [_curve(axes, i, line, len(curves) > 1) for i, line in enumerate(curves) if line.points]
    return call(
        TEMPLATE,
        "line_chart",
        size=(WIDTH, HEIGHT),
        axes=axes,
        sides=(LEFT, WIDTH - RIGHT),
        label=_label(axes, [line.name for line in curves if line.points]),
        reference=_level(axes, reference, drawn) if reference else None,
        diagonal=_diagonal(axes, diagonal) if diagonal else None,
        curves=drawn,
        readings=[_readings(axes, line) for line in curves if line.points],
    )


def _curve(axes: Axes, i: int, line: ChartLine, several: bool) -> dict[str, object]:
    """Return what the template draws of a line: course, band and markers; of few points error bars and values."""
    places = [axes.place(*point) for point in line.points]
    if not line.joined:
        unjoined = {"path": "", "band": "", "bars": [], "values": []}
        return {"style": style(i), "markers": [marker(i, *place) for place in places], **unjoined}
    few = len(places) <= FEW_POINTS
    stretch = max(1, math.ceil((len(places) - 1) / MARKED))
    marked = places[::-1][:: 1 if few else stretch] if several or few else places[-1:]
    values = [(x, y - 8, _anchor(x), number(value)) for (x, y), (_, value) in zip(places, line.points, strict=True)]
    return {
        "style": style(i),
        "path": "" if few else _path(places),
        "band": "" if few else _path([axes.place(*point) for point in _edge(line)]),
        "bars": _bars(axes, line) if few else [],
        "markers": [marker(i, *place) for place in marked],
        "values": values if few else [],
    }


def _bars(axes: Axes, line: ChartLine) -> list[tuple[float, float, float]]:
    """Return position, lower and upper end of each point's error bar; empty for a line without spread."""
    both = zip(line.points, line.spread, strict=True) if line.spread else ()
    return [(*axes.place(x, y - half), axes.place(x, y + half)[1]) for (x, y), half in both]


def _readings(axes: Axes, line: ChartLine) -> dict[str, object]:
    """Return a line's name and, for each point, position and text, for the page's script."""
    spread = line.spread or [0.0] * len(line.points)
    names = line.point_names or [""] * len(line.points)
    return {
        "name": line.name,
        "points": [
            [
                *axes.place(x, y),
                exact(x),
                number(y) + (f" ± {number(half)}" if half else "") + (f" ({name})" if name else ""),
            ]
            for (x, y), half, name in zip(line.points, spread, names, strict=True)
        ],
    }


def _level(
    axes: Axes, reference: tuple[str, float], curves: Sequence[dict[str, object]]
) -> tuple[float, float, str, int, str]:
    """Return the height of a reference line, and the height, text, position and anchor of its name.

    The name is at the right end, or at the left one where values are written next to points.
    """
    name, value = reference
    y = axes.place(axes.x_range[0], value)[1]
    labelled = any(curve["values"] for curve in curves)
    place = (LEFT + 2, "start") if labelled else (WIDTH - RIGHT, "end")
    return y, y + 11 if y < TOP + LINE else y - 4, f"{name} {number(value)}", *place


def _diagonal(axes: Axes, name: str) -> tuple[tuple[float, float], tuple[float, float], str]:
    """Return both ends of the line y = x inside the axes, and its name."""
    low = max(axes.x_range[0], axes.y_range[0])
    high = min(axes.x_range[1], axes.y_range[1])
    return axes.place(low, low), axes.place(high, high), name


def mark_chart(marks: Sequence[ChartMark | None], *, x_title: str = "", y_title: str = "") -> Markup:
    """Draw at least one named point with error bars as SVG; the horizontal axis starts at 0.

    None takes a colour and draws nothing.
    """
    present = [(i, mark) for i, mark in enumerate(marks) if mark is not None]
    ends = [mark.y + sign * mark.half for _, mark in present for sign in (-1, 1)]
    fitted = fit_axes([mark.x for _, mark in present], ends, x_title=x_title, y_title=y_title)
    x_ticks = ticks(0.0, max(mark.x for _, mark in present))
    axes = replace(fitted, x_ticks=x_ticks, x_range=(0.0, x_ticks[-1]))
    drawn, free = [], float(HEIGHT)
    for i, mark in sorted(present, key=lambda pair: pair[1].y):
        x, y = axes.place(mark.x, mark.y)
        low, high = (axes.place(mark.x, mark.y + sign * mark.half)[1] for sign in (-1, 1))
        # From bottom to top: each name is next to its point and above the previous name.
        free = min(y + 3.5, free - LINE)
        away, anchor = (-8, "end") if x > WIDTH / 2 else (8, "start")
        drawn.append(
            {
                "style": style(i),
                "bar": (x, low, high),
                "marker": marker(i, x, y),
                "name": (x + away, round(free, 1), anchor, mark.name),
            }
        )
    label = _label(axes, [f"{mark.name} {number(mark.y)}" for _, mark in present])
    size, sides = (WIDTH, HEIGHT), (LEFT, WIDTH - RIGHT)
    return call(TEMPLATE, "mark_chart", size=size, axes=axes, sides=sides, label=label, marks=drawn)


ROW = 34
"""Height of a row of a spread chart (SVG units)."""


def spread_chart(rows: Sequence[SpreadRow], x_title: str, reference: tuple[str, float] | None = None) -> Markup:
    """Draw one row per group as SVG: a point for each value, a bar over their range, a stroke at their mean.

    At least one row has a value. The axis starts at 0 where no value is negative.
    """
    values = [value for row in rows for value in row.values] + ([reference[1]] if reference else [])
    marks = ticks(min(0.0, *values), max(values))
    height = TOP + ROW * len(rows) + 50

    def across(value: float) -> float:
        share = (value - marks[0]) / (max(marks[-1], *values) - marks[0])
        return round(12 + share * (WIDTH - 24 - RIGHT), 1)

    drawn = []
    for i, row in enumerate(rows):
        y = TOP + ROW * i + 22
        mean = sum(row.values) / len(row.values) if row.values else None
        drawn.append(
            {
                "style": style(i),
                "name": row.name,
                "y": y,
                "points": [marker(i, across(value), y) for value in row.values],
                "range": (across(min(row.values)), across(max(row.values))) if row.values else None,
                "mean": None if mean is None else (across(mean), f"{mean:.3f}"),
            }
        )
    label = "; ".join(f"{row.name}: {', '.join(map(number, row.values)) or 'no value'}" for row in rows)
    return call(
        TEMPLATE,
        "spread_chart",
        size=(WIDTH, height),
        label=f"{x_title}. {label}",
        rows=drawn,
        ticks=[(across(tick), number(tick)) for tick in marks],
        bounds=(TOP, TOP + ROW * len(rows) + 8),
        x_title=x_title,
        reference=(across(reference[1]), f"{reference[0]} {number(reference[1])}") if reference else None,
    )


def legend(names: Sequence[str], joined: bool = True) -> Markup:
    """Return a legend of the lines of a chart, in their order. joined: False where no line joins their points."""
    entries = [(style(i), marker(i, 13, 6), name) for i, name in enumerate(names)]
    return call(TEMPLATE, "legend", entries=entries, joined=joined)


def chart_grid(charts: Markup) -> Markup:
    """Return charts side by side, as many as fit."""
    return call(TEMPLATE, "chart_grid", charts)


def chart_card(title: str, chart: Markup, *, value: str = "", keys: Markup | str = "", note: str = "") -> Markup:
    """Return a chart under its title, with its last value, its legend `keys`, and a note below it."""
    return call(TEMPLATE, "chart_card", title, chart, value, keys, note)


def style(i: int) -> str:
    """Return the CSS classes of line i, from 0."""
    return f"s{i % COLOURS + 1} d{i % DASHES}"


def marker(i: int, x: float, y: float) -> str:
    """Return the path of marker i around a position: circle, square, triangle, diamond."""
    shapes = (
        "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        "m-3.2 -3.2h6.4v6.4h-6.4z",
        "m0 -4.2l4 7.2h-8z",
        "m0 -4.6l4.2 4.6l-4.2 4.6l-4.2 -4.6z",
    )
    return f"M{x:g} {y:g}{shapes[i % MARKERS]}"


def _label(axes: Axes, names: Sequence[str]) -> str:
    """Return the accessible name of a chart: the names of its lines, and of its axes where they have titles."""
    over = f"; {axes.y_title} over {axes.x_title}" if axes.x_title and axes.y_title else ""
    return f"{', '.join(names)}{over}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _anchor(x: float) -> str:
    return "start" if x < LEFT + 20 else "end" if x > WIDTH - RIGHT - 20 else "middle"


def _edge(line: ChartLine) -> list[Point]:
    """Return the outline of the band: along its upper edge and back along the lower one."""
    if not line.spread:
        return []
    both = list(zip(line.points, line.spread, strict=True))
    return [(x, y + half) for (x, y), half in both] + [(x, y - half) for (x, y), half in reversed(both)]


def _thin(points: Sequence[Point]) -> list[Point]:
    stretch = max(1, math.ceil(len(points) / MOST_POINTS))
    groups = (points[i : i + stretch] for i in range(0, len(points), stretch))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]

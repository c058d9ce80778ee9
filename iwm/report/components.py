"""HTML components of the report page: sections, tables, figures, and charts as inline SVG.

The page is self-contained; colours come from templates/page.css.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from iwm.evaluation.result_table import ResultTable
from iwm.report.runs import Point


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def with_contents(sections: str) -> str:
    """Return the sections with a table of contents above them."""
    links = []

    def anchored(match: re.Match[str]) -> str:
        anchor = "-".join(re.findall(r"\w+", match[1].lower()))
        links.append(f'<a href="#{anchor}">{match[1]}</a>')
        return f'<section id="{anchor}"><h2>{match[1]}</h2>'

    body = re.sub(r"<section><h2>(.*?)</h2>", anchored, sections)
    return f'<nav aria-label="Contents">{"".join(links)}</nav>{body}' if len(links) > 1 else body


def details(title: str, content: str, kind: str = "") -> str:
    """Return content that is folded under its title; `kind` is a CSS class."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<details{attribute}><summary>{escape(title)}</summary>{content}</details>"


def chart_grid(charts: str) -> str:
    return f'<div class="charts">{charts}</div>'


def figure(picture: Path, alt: str, caption: str) -> str:
    """Return a PNG file, embedded as base64, with its caption."""
    data = base64.b64encode(picture.read_bytes()).decode()
    image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def table(head: Iterable[str], rows: Iterable[str]) -> str:
    """Return a table with horizontal scrolling; `rows` are the cells of each row as HTML."""
    titles = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    # tabindex: a scrolling region must be reachable by keyboard.
    return f'<div class="wide" tabindex="0"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def html_table(result: ResultTable) -> str:
    """Return a table with its title and the first line of its caption; further lines are folded below it."""
    rows = (
        f'<th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        for name, *cells in result.rows
    )
    first, *more = result.caption.splitlines() or [""]
    about = f"<p>{escape(first)}</p>" if first else ""
    folded = details("Details of these results", "".join(f"<p>{escape(line)}</p>" for line in more)) if more else ""
    return f"<h3>{escape(result.title)}</h3>{about}{table(result.columns, rows)}{folded}"


def stored_tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the tables that are stored in a result."""
    return [ResultTable(**fields) for fields in result["tables"]]


WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 26
MOST_POINTS = 300
COLOURS = 8
"""Number of colours in page.css, s1 to s8. The dash changes every four lines, so that 24 lines are distinguishable and
no more than four by colour alone."""
DASHES = 3
LINE = 12
"""Height of a line of text (SVG units)."""


@dataclass(frozen=True)
class ChartLine:
    """One curve; points are (step, value) with rising steps, all finite."""

    name: str
    points: Sequence[Point]
    spread: Sequence[float] = ()
    """Half the height of a band around the line, one value per point, or empty. A line with a band is not thinned."""


@dataclass(frozen=True)
class ChartMark:
    """One named point; `half` is half the length of its error bar (0: none)."""

    name: str
    x: float
    y: float
    half: float = 0.0


@dataclass(frozen=True)
class _Frame:
    """Axes of a chart: maps values to SVG coordinates."""

    x_ticks: list[float]
    y_ticks: list[float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        (x_low, x_high), (y_low, y_high) = self.x_range, self.y_range
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def opened(self, label: str) -> list[str]:
        """Return the opening parts of the SVG: accessible name, grid and tick labels."""
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
        for tick in self.y_ticks:
            y = self.place(self.x_range[0], tick)[1]
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
        for tick in self.x_ticks:
            x = self.place(tick, self.y_range[0])[0]
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(tick)}</text>')
        return parts


def line_chart(lines: Sequence[ChartLine], reference: tuple[str, float] | None = None, from_zero: bool = False) -> str:
    """Draw lines over steps as SVG; `reference` is a named dashed level such as chance. At least one line has points.

    A line without points still takes its colour. The value axis starts at 0 unless all values are far from 0, or always
    with `from_zero`. Curves of more than MOST_POINTS points are averaged over equal intervals.
    """
    curves = [line if line.spread else ChartLine(line.name, _thin(line.points)) for line in lines]
    xs = [x for line in curves for x, _ in line.points]
    ys = [y for line in curves for _, y in (*line.points, *_edge(line))] + ([reference[1]] if reference else [])
    y_ticks = _ticks(0.0 if from_zero else _lowest(ys), max(ys))
    frame = _Frame(
        x_ticks=_ticks(min(xs), max(xs), inside=True),
        y_ticks=y_ticks,
        x_range=(min(xs), max(xs)),
        y_range=(min(y_ticks[0], *ys), max(y_ticks[-1], *ys)),
    )
    parts = frame.opened(", ".join(line.name for line in curves if line.points))
    if reference:
        y = frame.place(min(xs), reference[1])[1]
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = f"{escape(reference[0])} {number(reference[1])}"
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{label}</text>')
    for i, line in enumerate(curves):
        if not line.points:
            continue
        path, edge = (
            " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.place(*point) for point in points))
            for points in (line.points, _edge(line))
        )
        x, y = frame.place(*line.points[-1])
        if edge:
            parts.append(f'<polygon class="band dot {_style(i)}" points="{edge}"/>')
        parts.append(f'<polyline class="line {_style(i)}" points="{path}"/>')
        parts.append(f'<circle class="dot {_style(i)}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return "".join([*parts, "</svg>"])


def mark_chart(marks: Sequence[ChartMark | None]) -> str:
    """Draw at least one named point with error bars as SVG; the horizontal axis starts at 0.

    None takes a colour and draws nothing.
    """
    present = [(i, mark) for i, mark in enumerate(marks) if mark is not None]
    x_ticks = _ticks(0.0, max(mark.x for _, mark in present))
    ends = [mark.y + sign * mark.half for _, mark in present for sign in (-1, 1)]
    y_ticks = _ticks(_lowest(ends), max(ends))
    frame = _Frame(x_ticks, y_ticks, (0.0, x_ticks[-1]), (min(y_ticks[0], *ends), max(y_ticks[-1], *ends)))
    parts = frame.opened(", ".join(mark.name for _, mark in present))
    free = float(HEIGHT)
    for i, mark in sorted(present, key=lambda pair: pair[1].y):
        (x, low), (_, high) = (frame.place(mark.x, mark.y + sign * mark.half) for sign in (-1, 1))
        y = frame.place(mark.x, mark.y)[1]
        # From bottom to top: each name is next to its point and above the previous name.
        free = min(y + 3.5, free - LINE)
        away, anchor = (-8, "end") if x > WIDTH / 2 else (8, "start")
        parts.append(f'<path class="line {_style(i)}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        parts.append(f'<circle class="dot {_style(i)}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(f'<text x="{x + away:.1f}" y="{free:.1f}" text-anchor="{anchor}">{escape(mark.name)}</text>')
    return "".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """Return a legend of the lines of a chart, in their order."""
    mark = '<svg viewBox="0 0 26 8" aria-hidden="true"><path class="line {}" d="M1 4H25"/></svg>'
    marks = "".join(f"<span>{mark.format(_style(i))}{escape(name)}</span>" for i, name in enumerate(names))
    return f'<div class="legend">{marks}</div>'


def _edge(line: ChartLine) -> list[Point]:
    """Return the outline of the band: along its upper edge and back along the lower one."""
    if not line.spread:
        return []
    both = list(zip(line.points, line.spread, strict=True))
    return [(x, y + half) for (x, y), half in both] + [(x, y - half) for (x, y), half in reversed(both)]


def _style(i: int) -> str:
    """Return the CSS classes of line i, from 0."""
    return f"s{i % COLOURS + 1} d{i // 4 % DASHES}"


def number(value: float) -> str:
    """Format a value with three or four digits: 12k, 0.351, 1.0e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = limit if suffix != "k" else 1e3
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.4g}" if size >= 100 else f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}"


def _lowest(values: list[float]) -> float:
    low, high = min(values), max(values)
    return 0.0 if 0 <= low < 0.6 * high else low


def _ticks(low: float, high: float, count: int = 4, inside: bool = False) -> list[float]:
    """Return about `count` round values, at least two, that span [low, high], or lie inside it with `inside`."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low, high) if inside else (low - pad, high + pad)
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = (
        (math.ceil(low / step), math.floor(high / step)) if inside else (math.floor(low / step), math.ceil(high / step))
    )
    return [round(i * step, 12) for i in range(first, last + 1)]


def _thin(points: Sequence[Point]) -> list[Point]:
    stretch = max(1, math.ceil(len(points) / MOST_POINTS))
    groups = (points[i : i + stretch] for i in range(0, len(points), stretch))
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]

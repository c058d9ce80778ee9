"""Axes of a chart: ranges, round ticks, positions in SVG units, and short numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 226
"""Size of a chart (SVG units)."""
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 26, 38


@dataclass(frozen=True)
class Axes:
    """Two linear axes with their ticks and titles; a title may be empty."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    """Rising: the lower value is smaller than the upper one."""
    x_title: str = ""
    y_title: str = ""

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a value (SVG units), rounded to a tenth."""
        (x_low, x_high), (y_low, y_high) = self.x_range, self.y_range
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low)
        left, top = LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
        return round(left, 1), round(top, 1)

    @property
    def x_marks(self) -> list[tuple[float, str]]:
        """Position and label of each tick of the horizontal axis."""
        return [(self.place(tick, self.y_range[0])[0], number(tick)) for tick in self.x_ticks]

    @property
    def y_marks(self) -> list[tuple[float, str]]:
        """Position and label of each tick of the vertical axis."""
        return [(self.place(self.x_range[0], tick)[1], number(tick)) for tick in self.y_ticks]


def fit_axes(
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    from_zero: bool = False,
    top: float | None = None,
    x_range: tuple[float, float] | None = None,
    x_title: str = "",
    y_title: str = "",
) -> Axes:
    """Return axes that hold all values.

    The value axis starts at 0 unless all values are far from 0; with `from_zero` always, where no value is negative.
    top: end of the value axis, for a share 1; larger values extend it. x_range: ends of the horizontal axis, which hold
    all values; None: the smallest and the largest of them.
    """
    low = 0.0 if from_zero and min(ys) >= 0 else _lowest(ys)
    across = x_range or (min(xs), max(xs))
    y_ticks = ticks(low, max(ys) if top is None else max(*ys, top))
    return Axes(
        x_ticks=ticks(*across, inside=True),
        y_ticks=y_ticks,
        x_range=across,
        y_range=(min(y_ticks[0], *ys), max(y_ticks[-1], *ys)),
        x_title=x_title,
        y_title=y_title,
    )


def _lowest(values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return 0.0 if 0 <= low < 0.6 * high or low == high == 0 else low


def ticks(low: float, high: float, count: int = 4, inside: bool = False) -> list[float]:
    """Return about `count` round values, at least two, that span [low, high], or lie inside it with `inside`.

    A range of one value is widened: 0 to 1 around 0, else by a tenth on both sides.
    """
    if high <= low:
        if inside:
            return [low]
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) * 0.1, low + abs(low) * 0.1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = (
        (math.ceil(low / step), math.floor(high / step)) if inside else (math.floor(low / step), math.ceil(high / step))
    )
    return [round(i * step, 12) for i in range(first, last + 1)]


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


def exact(value: float) -> str:
    """Format a position for reading: whole numbers in full, others as `number`."""
    return f"{value:,.0f}" if float(value).is_integer() else number(value)

"""How far is it? A live bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from shards.pool import Tally

PLAIN_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""


def show_progress(tallies: Iterable[Tally], total: int, console: Console, bad: str = "rejected") -> None:
    """Consume the tallies, showing images done of `total`, how many are bad, images/s and the time left."""
    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[rate]:,.0f} images/s"),
        TimeRemainingColumn(),
        TextColumn(f"{{task.fields[bad]:,}} {bad}"),
    )
    start = line = time.monotonic()
    done = found = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total, rate=0.0, bad=0)
        for tally in tallies:
            done, found = done + tally.done, found + tally.bad
            now = time.monotonic()
            rate = done / max(now - start, 1e-9)
            progress.update(bar, completed=done, rate=rate, bad=found)
            if not console.is_terminal and (now - line > PLAIN_EVERY or done == total):
                line = now
                left = timedelta(seconds=round((total - done) / rate)) if rate else "?"
                console.print(f"{done:,}/{total:,} images, {rate:,.0f} images/s, {left} left, {found:,} {bad}")

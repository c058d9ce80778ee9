"""Tables of the page: from rows of cells, and from the ResultTables that results store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from iwm.evaluation.result_table import ResultTable
from iwm.report.templates import call

TEMPLATE = "components.html"


@dataclass(frozen=True)
class Cell:
    """Cell of a table. All of it is text."""

    text: str
    after: str = ""
    """Text after the main text, which is then bold: ± standard error."""
    note: str = ""
    """Second line, in small type."""
    share: float | None = None
    """Length of the bar behind the text, from 0 to 1; None: no bar."""
    value: float | None = None
    """Number that a sortable table sorts by; None: by the text."""
    href: str = ""
    """Relative address that the text links to."""


def table(
    head: Iterable[str], rows: Iterable[Sequence[Cell | str]], label: str = "", *, sortable: bool = False
) -> Markup:
    """Return a table with horizontal scrolling; the first cell of each row is its head.

    label: accessible name. sortable: the page's script sorts by a column when its head is pressed.
    """
    cells = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    return call(TEMPLATE, "table", list(head), cells, label, sortable)


def html_table(result: ResultTable) -> Markup:
    """Return a table with its title and the first line of its caption; further lines are folded below it."""
    first, *more = result.caption.splitlines() or [""]
    content = table(result.columns, result.rows, result.title)
    return call(TEMPLATE, "result_table", result.title, first, content, more)


def stored_tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the tables that are stored in a result."""
    return [ResultTable(**fields) for fields in result["tables"]]

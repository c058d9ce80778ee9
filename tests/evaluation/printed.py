"""A table as a terminal of a given width shows it."""

from __future__ import annotations

import re

from rich.console import Console

from iwm.evaluation.result_table import ResultTable


def printed(table: ResultTable, width: int = 80) -> list[str]:
    """Return the lines of a table."""
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def assert_whole(table: ResultTable, width: int = 80) -> None:
    """Assert that every cell stands on one line, and every word of every name and heading too."""
    lines = printed(table, width)
    assert max(map(len, lines)) <= width
    body = "\n".join(lines[1:])
    words = set(body.split())
    for row in table.rows:
        assert set(row[0].split()) <= words, row[0]
        for cell in filter(None, row[1:]):
            assert re.search(rf"(^|\s\s){re.escape(cell)}(\s\s|\s*$)", body, re.M), cell
    for column in table.columns:
        assert set(column.split()) <= words, column

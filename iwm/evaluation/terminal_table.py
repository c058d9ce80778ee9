"""Tables for the terminal. One that is too wide is divided into blocks of columns, stacked under repeated row names.

Cells are not broken, and names of rows and columns only between words, wherever the terminal has room for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

GAP = 3
"""Characters between two columns."""
NAMES = 24
"""Width to which row names may be wrapped so that more columns fit side by side."""
HEAD_LINES = 3
"""Largest number of lines of a column's heading, unless a word of it fills a line."""
INDENT = "  "
"""Beginning of the further lines of a row's name."""


@dataclass(frozen=True)
class TableLayout:
    """Width of the row names, and blocks: index and width of each of their columns."""

    names: int
    blocks: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class TerminalTable:
    """Rich renderable of a title, a table in as many blocks as the terminal's width needs, and a caption.

    Text is not parsed as markup: names may have colons or brackets.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        if self.title:
            yield Text(self.title, "table.title")
        found = layout(self.columns, self.rows, options.max_width)
        for block in found.blocks:
            yield Text()
            yield self._block([(0, found.names), *block])
        if self.caption:
            yield Text()
            yield Text(self.caption, "table.caption")
        yield Text()

    def _block(self, places: Sequence[tuple[int, int]]) -> Table:
        heads = [_wrap(self.columns[i], width) for i, width in places]
        height = max(map(len, heads))
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for (i, width), lines in zip(places, heads, strict=True):
            head = "\n".join([""] * (height - len(lines)) + lines)
            table.add_column(Text(head), justify="right" if i else "left", width=width, overflow="fold")
        for row in self.rows:
            name = "\n".join(_wrap(row[0], places[0][1], INDENT))
            table.add_row(Text(name), *(Text(row[i]) for i, _ in places[1:]))
        return table


def layout(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> TableLayout:
    """Return the layout with the fewest blocks, then the fewest lines of headings, then the widest row names.

    Every column but the first, of row names, is in one block. columns: headings. width: of the terminal.
    """
    names = [columns[0], *(row[0] for row in rows)]
    whole, word = _longest(names), len(INDENT) + _longest_word(names)
    layouts = []
    for lines in range(1, HEAD_LINES + 1):
        needed = [_needed(columns[i], [row[i] for row in rows], lines) for i in range(1, len(columns))]
        # In a very narrow terminal something has to be broken.
        beside = max(width - GAP - max(needed, default=0), width // 2, 1)
        size = min(whole, max(word, NAMES), beside)
        blocks = _pack(needed, width - size)
        spare = width - size - max(sum(GAP + used for _, used in block) for block in blocks)
        layouts.append(TableLayout(min(whole, size + max(spare, 0)), blocks))
    return min(layouts, key=lambda layout: len(layout.blocks))


def _pack(needed: Sequence[int], room: int) -> list[list[tuple[int, int]]]:
    """Divide columns into blocks, in their order. needed: widths from column 1 on. room: width beside the row names."""
    blocks: list[list[tuple[int, int]]] = [[]]
    left = room
    for i, size in enumerate(needed, start=1):
        if blocks[-1] and GAP + size > left:
            blocks.append([])
            left = room
        blocks[-1].append((i, max(1, min(size, room - GAP))))
        left -= GAP + size
    return blocks


def _needed(head: str, cells: Sequence[str], lines: int) -> int:
    """Return the width of a column with whole cells and a heading of about `lines` lines, broken between words."""
    least = max(_longest(cells), _longest_word([head]), 1)
    return next(size for size in range(least, least + cell_len(head) + 1) if len(_wrap(head, size)) <= lines)


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Break a text between words into lines of at most `width` characters; a longer word has a line for itself."""
    lines = [""]
    for word in text.split():
        if lines[-1].strip() and cell_len(f"{lines[-1]} {word}") > width:
            lines.append(indent + word)
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines


def _longest(texts: Sequence[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _longest_word(texts: Sequence[str]) -> int:
    return _longest([word for text in texts for word in text.split()])

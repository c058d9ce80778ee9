"""Table of results as text, for the terminal, the page and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

    from iwm.evaluation.terminal_table import TerminalTable


@dataclass(frozen=True)
class ResultTable:
    """Title, column headings, cells and caption of one table, which rich's console prints."""

    title: str
    columns: list[str]
    """Column headings, including that of the row names."""
    rows: list[list[str]]
    """Cells by row; the first cell is the row name."""
    caption: str = ""
    """First line: description of the values. Further lines: details, which the page folds."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[TerminalTable]:
        # Imported here: rich takes time that the page and Markdown do not need.
        from iwm.evaluation.terminal_table import TerminalTable

        yield TerminalTable(self.title, self.columns, self.rows, self.caption)

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        text = "\n".join(f"| {' | '.join(_without_bars(line))} |" for line in lines)
        return f"**{self.title}.** {self.caption}\n\n{text}\n"


def _without_bars(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


def format_mean_stderr(score: Mapping[str, float], digits: int = 3, times: float = 1) -> str:
    """Format a mean over images with its standard error; `times` is 100 for percent."""
    return f"{times * score['mean']:.{digits}f}±{times * score['standard_error']:.{digits}f}"

"""Regenerate the report page of a run, or compare runs on one page: RUN [RUN ...] [--out FILE]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from shards.command_line import run_command
from shards.errors import UserError


@dataclass(frozen=True)
class ReportOptions:
    """Write one self-contained HTML page with the results of one run, or a comparison of several runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, for example runs/demo."""
    out: Path | None = None
    """HTML file to write. Default: RUN/report.html for one run, comparison.html next to the first of several runs."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m iwm.report") -> None:
    """Write the page. arguments: None for those of the program. Raises UserError for what the user can fix."""
    options = tyro.cli(ReportOptions, args=arguments, description=__doc__, prog=prog)
    if not options.runs:
        raise UserError("no run is given: name at least one run folder, for example runs/demo")
    # Imported late: torch and DALI take seconds, and a mistyped option must fail at once.
    from iwm.report.page import write_page

    first = options.runs[0]
    default = first / "report.html" if len(options.runs) == 1 else first.resolve().parent / "comparison.html"
    print(write_page(options.runs, options.out or default))


if __name__ == "__main__":
    sys.exit(run_command(main, "iwm.report"))

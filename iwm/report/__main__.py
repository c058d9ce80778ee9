"""Regenerate the report page of a run, or compare runs on one page: python -m iwm.report RUN [RUN ...] [--out FILE]"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from shards.errors import UserError, run_command


@dataclass(frozen=True)
class ReportOptions:
    """Write one self-contained HTML page with the results of one run, or a comparison of several runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, for example runs/demo."""
    out: Path | None = None
    """HTML file to write. Default: RUN/report.html for one run, comparison.html next to the first of several runs."""


def main() -> None:
    options = tyro.cli(ReportOptions, description=__doc__, prog="python -m iwm.report")
    if not options.runs:
        raise UserError("no run is given: name at least one run folder, for example runs/demo")
    # Imported late: torch and DALI take seconds, and a mistyped option must fail at once.
    from iwm.report.page import write_page

    first = options.runs[0]
    default = first / "report.html" if len(options.runs) == 1 else first.resolve().parent / "comparison.html"
    print(write_page(options.runs, options.out or default))


if __name__ == "__main__":
    sys.exit(run_command(main, "iwm.report"))

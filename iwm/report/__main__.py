"""Make a run's page anew, or one page that compares runs: python -m iwm.report RUN [RUN ...] [--out FILE]"""

from __future__ import annotations

import dali_pipelines.command  # noqa: F401  # isort: skip  # first: it ends the command where DALI is missing

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from iwm.report.page import write_page
from iwm.report.run_folder import ReportError


@dataclass(frozen=True)
class Options:
    """One self-contained page of what a run did, or of how several compare."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, as runs/demo."""
    out: Path | None = None
    """The page. Default: RUN/report.html of one run, comparison.html beside the first of several."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__, prog="python -m iwm.report")
    try:
        if not options.runs:
            raise ReportError("no run is given: name at least one run's folder, as runs/demo")
        first = options.runs[0]
        beside = first / "report.html" if len(options.runs) == 1 else first.resolve().parent / "comparison.html"
        print(write_page(options.runs, options.out or beside))
    except (ReportError, OSError) as problem:
        sys.exit(f"iwm.report: {problem}")


if __name__ == "__main__":
    main()

"""Self-contained report page of one run (RUN/report.html) or of several runs, from the files in the run folders.

A section is a function that returns HTML, or "" where its results are missing. To add a section for each run (a figure,
a table), write a function of `RunResults` and add it to SECTIONS. In a comparison it is folded under the run's name.
The frame and the style of the page are in templates/page.html and page.css.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import Markup

from iwm.report.components import details, with_contents
from iwm.report.downstream import downstream_section, downstream_tables
from iwm.report.evaluator_sections import (
    corruption_section,
    marginalised,
    nearest_neighbours,
    patch_maps,
    retrieval_picture,
    similarity_matrix,
    sweep_section,
)
from iwm.report.explorer import explorer
from iwm.report.provenance import left_out_section, training_images
from iwm.report.runs import ReportError, RunResults, read_runs
from iwm.report.templates import render
from iwm.report.training import configuration, curves
from iwm.report.world_model import summary_tiles, world_model
from shards.atomic import write_atomically

OVERVIEW: tuple[Callable[[Sequence[RunResults]], str], ...] = (summary_tiles, world_model, explorer, downstream_tables)
"""Sections that show all runs in one table or chart, at the top of the page."""

SECTIONS: tuple[Callable[[RunResults], str], ...] = (
    retrieval_picture,
    sweep_section,
    corruption_section,
    similarity_matrix,
    marginalised,
    patch_maps,
    nearest_neighbours,
    left_out_section,
    downstream_section,
)
"""Sections of a single run."""

BACKGROUND: tuple[Callable[[Sequence[RunResults]], str], ...] = (curves, configuration)
"""Sections on training and configuration of all runs, at the end of the page."""


def write_report(folder: Path) -> Path:
    """Regenerate RUN/report.html. Raises the ReportError of `read_run`."""
    return write_page([folder], folder / "report.html")


def write_page(folders: Sequence[Path], path: Path, lead: str = "") -> Path:
    """Write one page with one run or a comparison of several; `lead` is an HTML section before all others.

    Raises the ReportError of `read_runs`, and ReportError for a result without a required field.
    """
    runs = read_runs(folders)
    try:
        body = _body(runs, lead)
    except KeyError as error:
        places = ", ".join(str(run.folder / "eval") for run in runs)
        raise ReportError(
            f"{places}: a result lacks {error}, so another version of iwm wrote it; evaluate again or delete it"
        ) from error
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    write_atomically(path, render("page.html", title=title, body=Markup(body)).encode())
    return path


def _body(runs: Sequence[RunResults], lead: str) -> str:
    top, *overview = (section(runs) for section in OVERVIEW)
    top += training_images(runs)
    own = ["\n".join(section(run) for section in SECTIONS) for run in runs]
    background = [section(runs) for section in BACKGROUND]
    if len(runs) == 1:
        return top + with_contents("\n".join([lead, *overview, *own, *background]))
    folded = [details(run.name, content, "run") for run, content in zip(runs, own, strict=True) if content.strip()]
    return "\n".join([top, lead, *overview, *folded, *background])

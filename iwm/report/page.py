"""Self-contained report page of one run (RUN/report.html) or of several runs, from the files in the run folders.

A section is a function that returns Markup, empty where its results are missing. To add a section for each run (a
figure, a table), write a function of `RunResults` and add it to SECTIONS. In a comparison it is folded under the run's
name. The frame, the style and the script of the page are templates/page.html, page.css and page.js.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import Markup

from iwm.report.comparison import comparison
from iwm.report.components import details, with_anchors
from iwm.report.configuration import configuration
from iwm.report.downstream import downstream_section, downstream_tables
from iwm.report.efficiency import efficiency
from iwm.report.equivariance import equivariance
from iwm.report.evaluator_sections import (
    composition_section,
    corruption_section,
    marginalised,
    nearest_neighbours,
    patch_maps,
    retrieval_picture,
    similarity_matrix,
    sweep_section,
)
from iwm.report.explorer import explorer
from iwm.report.glossary import GLOSSARY
from iwm.report.inferred_actions import inferred_actions
from iwm.report.provenance import left_out_section, not_evaluated
from iwm.report.runs import ReportError, RunResults, read_runs
from iwm.report.summary import summary
from iwm.report.templates import render
from iwm.report.training import curves
from iwm.report.world_model import world_model
from shards.atomic import write_atomically

OVERVIEW: tuple[tuple[Callable[[Sequence[RunResults]], Markup], str], ...] = (
    (world_model, "mrr"),
    (explorer, "explorer"),
    (equivariance, ""),
    (efficiency, ""),
    (downstream_tables, ""),
)
"""Sections that show all runs in one table or chart, at the top of the page, with the evaluator whose results they show
('' for others). Where a single run left it out, the reason takes the place of the section."""

SECTIONS: tuple[tuple[Callable[[RunResults], Markup], str], ...] = (
    (retrieval_picture, "retrieval"),
    (sweep_section, "parameter-sweep"),
    (corruption_section, "corruptions"),
    (composition_section, "composition"),
    (inferred_actions, "infer-action"),
    (similarity_matrix, "similarity"),
    (marginalised, "marginalisation"),
    (patch_maps, "feature-maps"),
    (nearest_neighbours, "knn"),
    (downstream_section, ""),
)
"""Sections of a single run, with the evaluator whose results they show ('' for others)."""

BACKGROUND: tuple[Callable[[Sequence[RunResults]], Markup], ...] = (curves, configuration)
"""Sections on training and configuration of all runs, at the end of the page."""


def write_report(folder: Path) -> Path:
    """Regenerate RUN/report.html. Raises the ReportError of `read_run`."""
    return write_page([folder], folder / "report.html")


def write_page(folders: Sequence[Path], path: Path, lead: Markup | None = None) -> Path:
    """Write one page with one run or a comparison of several; `lead` is a section before all others.

    Raises the ReportError of `read_runs`, and ReportError for a result without a required field.
    """
    runs = read_runs(folders)
    try:
        page = _page(runs, path.parent, lead or Markup())
    except KeyError as error:
        places = ", ".join(str(run.folder / "eval") for run in runs)
        raise ReportError(
            f"{places}: a result lacks {error}, so another version of iwm wrote it; evaluate again or delete it"
        ) from error
    write_atomically(path, page.encode())
    return path


def _page(runs: Sequence[RunResults], folder: Path, lead: Markup) -> Markup:
    single = len(runs) == 1
    overview = [section(runs) or _left_out(runs, evaluator) for section, evaluator in OVERVIEW]
    own = [
        Markup().join(section(run) or _left_out([run], evaluator) for section, evaluator in SECTIONS) for run in runs
    ]
    first, links = with_anchors(Markup().join([lead, comparison(runs, folder), *overview, *(own if single else ())]))
    folded = [details(run.name, content, "run") for run, content in zip(runs, own, strict=True) if content.strip()]
    last, more_links = with_anchors(Markup().join(section(runs) for section in BACKGROUND))
    return render(
        "page.html",
        title=runs[0].name if single else f"{len(runs)} runs",
        top=summary(runs),
        links=[*links, *more_links, ("glossary", Markup("Glossary"))],
        remark=not_evaluated(runs[0]) if single else Markup(),
        body=Markup().join([first, *(() if single else folded), last]),
        glossary=GLOSSARY,
    )


def _left_out(runs: Sequence[RunResults], evaluator: str) -> Markup:
    return left_out_section(runs[0], evaluator) if len(runs) == 1 and evaluator else Markup()

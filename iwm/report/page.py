"""RUN/report.html: one self-contained page of what a run did, made from what it left on disk and nothing else.

A section is a function from `Run` to HTML that gives "" where its material is missing, so the page holds only what was
run. To add one, write it and name it in SECTIONS; the page's looks are in page.html beside this file.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from iwm.report.configuration import configuration
from iwm.report.pictures import retrieval_picture
from iwm.report.run_folder import Run, read_run
from iwm.report.scores import headline, world_model
from iwm.report.training import curves
from shards.atomic import write_atomically

SECTIONS: tuple[Callable[[Run], str], ...] = (headline, world_model, retrieval_picture, curves, configuration)


def write_report(folder: Path) -> Path:
    """Make RUN/report.html anew. Raises ReportError as `read_run` does."""
    run = read_run(folder)
    template = Template((resources.files("iwm.report") / "page.html").read_text())
    body = "\n".join(section(run) for section in SECTIONS)
    path = folder / "report.html"
    write_atomically(path, template.substitute(title=escape(run.name), body=body).encode())
    return path

"""Figures of small images on the page: each image is an `<img>` with its own text alternative.

Data are the records and the zip that `write_figures` stores with a result (iwm/evaluation/figures.py).
"""

from __future__ import annotations

import base64
import zipfile
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError
from markupsafe import Markup

from iwm.report.runs import ReportError, RunResults
from iwm.report.templates import render


def figures(run: RunResults, result: dict[str, Any]) -> Markup:
    """Return all figures of a result; '' where it has none.

    Raises ReportError, which names the zip, where it or an image of it is missing, and for a malformed figure. Raises
    KeyError for a result without the field `figures`.
    """
    records = result["figures"]
    if not records:
        return Markup()
    images = _Archive(run.folder / "eval" / Path(result["tiles"]).name, result["protocol"])
    try:
        return Markup("").join(render("picture_grid.html", figure=record, source=images.source) for record in records)
    except UndefinedError as error:
        raise ReportError(f"{images.path}: its figures are malformed ({error}); {images.remedy}") from error


class _Archive:
    """Images of one result by their names in its zip, as data URIs."""

    def __init__(self, path: Path, protocol: str) -> None:
        self.remedy = f"rerun iwm evaluate {protocol}"
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.images = {name: archive.read(name) for name in archive.namelist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise ReportError(f"{path}: the images of a figure cannot be read ({error}); {self.remedy}") from error

    def source(self, name: str) -> str:
        """Return the value of an image's `src`."""
        if name not in self.images:
            raise ReportError(f"{self.path}: lacks {name}; {self.remedy}")
        return f"data:image/webp;base64,{base64.b64encode(self.images[name]).decode()}"

"""Interactive explorer of actions on the report page.

Its data are the files of the evaluator `explorer` (iwm/evaluation/explorer.py), embedded in the page; markup, style and
script are templates/explorer.*.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from iwm.evaluation.bank import TIE_TOLERANCE, UNCONDITIONED_NOTE
from iwm.report.components import section
from iwm.report.provenance import TITLES, origin_paragraph
from iwm.report.runs import ReportError, RunResults
from iwm.report.templates import render

FOR_THE_SCRIPT = ("bank", "chance", "columns", "side", "axes", "words", "sources")
"""Fields of explorer.json that the script reads."""

BUTTONS = {"nothing": "No change", "random": "Random action", "best": "Best action", "worst": "Worst action"}

VIEWS = {"source": "source", "true": "true view", "retrieved": "nearest view"}


def explorer(runs: Sequence[RunResults]) -> Markup:
    """Return the explorer of a single run; '' in a comparison, where each run would add a few megabytes."""
    results = runs[0].evaluations_of("explorer") if len(runs) == 1 else {}
    if not results:
        return Markup()
    parts = (_section(runs[0], name, result) for name, result in results.items())
    return Markup().join([*parts, render("explorer_script.html")])


def _section(run: RunResults, name: str, result: dict[str, Any]) -> Markup:
    """Return the section of one result; `name` is its file name without suffix."""
    content = render(
        "explorer.html",
        origin=origin_paragraph(run, result),
        name=name,
        note=UNCONDITIONED_NOTE if result["conditioning"] == "none" else "",
        data=htmlsafe_json_dumps(_data(run.folder / "eval", result), separators=(",", ":")),
        photographs=[photograph["key"] for photograph in result["photographs"]],
        sources=[source["name"] for source in result["sources"]],
        axes=[(axis, len(values)) for axis, values in result["axes"].items()],
        views=list(VIEWS.items()),
        buttons=list(BUTTONS.items()),
        **{field: result[field] for field in ("bank", "same_rank", "largest_difference")},
    )
    return section(TITLES["explorer"], content)


def _data(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return the data of the script: little-endian int16 points and float32 norms per photograph, as base64."""
    path = _file(folder, result["points"])
    arrays = np.load(path)
    expected = (len(result["photographs"]), 1 + len(result["sources"]), result["bank"], result["components"])
    if arrays["points"].shape != expected:
        raise ReportError(f"{path}: does not match its JSON; rerun iwm evaluate explorer")
    photographs = [
        {
            "picture": f"data:image/webp;base64,{_base64(_file(folder, photograph['picture']).read_bytes())}",
            "scale": photograph["scale"],
            "points": _base64(points.astype("<i2").tobytes()),
            "norms": _base64(norms.astype("<f4").tobytes()),
        }
        for photograph, points, norms in zip(result["photographs"], arrays["points"], arrays["norms"], strict=True)
    ]
    return {**{key: result[key] for key in FOR_THE_SCRIPT}, "tie": TIE_TOLERANCE, "photographs": photographs}


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise ReportError(f"{path}: missing data of the explorer; rerun iwm evaluate explorer")
    return path


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()

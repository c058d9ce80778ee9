"""Interactive explorer of actions on the report page.

Its data are the files of the evaluator `explorer` (iwm/evaluation/explorer.py), embedded in the page; its script is
explorer.js next to this file.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from iwm.evaluation.bank import TIE_TOLERANCE, UNCONDITIONED_NOTE
from iwm.report.components import section
from iwm.report.provenance import origin_paragraph
from iwm.report.runs import ReportError, RunResults

FOR_THE_SCRIPT = ("bank", "chance", "columns", "side", "axes", "words", "sources")
"""Fields of explorer.json that the script reads."""

MEANING = """<p>Select a photograph, a source and an action. The explorer shows the view nearest to the prediction among
the photograph's {bank} views. Distances and ranks are those of MRR, precomputed from features averaged over tokens.
{same:.0%} of all ranks are exact; compression changes the other ranks by at most {most:g}.</p>"""

BUTTONS = {"nothing": "No change", "random": "Random action", "best": "Best action", "worst": "Worst action"}

VIEWS = {"source": "source", "true": "true view", "retrieved": "view nearest to the prediction"}


def explorer(runs: Sequence[RunResults]) -> Markup:
    """Return the explorer of a single run; '' in a comparison, where each run would add a few megabytes."""
    results = runs[0].evaluations_of("explorer") if len(runs) == 1 else {}
    if not results:
        return Markup()
    script = (resources.files("iwm.report") / "explorer.js").read_text()
    parts = "".join(_one(runs[0], name, result) for name, result in results.items())
    return Markup(f"{parts}<script>{script}</script>")


def _one(run: RunResults, name: str, result: dict[str, Any]) -> Markup:
    controls = (
        _choice(name, "photograph", [("", f"photograph {i + 1}") for i in range(len(result["photographs"]))]),
        _choice(name, "source", [(source["name"], source["name"]) for source in result["sources"]]),
    )
    data = json.dumps(_data(run.folder / "eval", result), separators=(",", ":")).replace("</", "<\\/")
    buttons = "".join(f'<button type="button" value="{value}">{text}</button>' for value, text in BUTTONS.items())
    sliders = "".join(_slider(name, axis, values) for axis, values in result["axes"].items())
    views = "".join(_view(role, caption) for role, caption in VIEWS.items())
    meaning = MEANING.format(bank=result["bank"], same=result["same_rank"], most=result["largest_difference"])
    note = f"<p>{UNCONDITIONED_NOTE}</p>" if result["conditioning"] == "none" else ""
    axes = list(result["axes"])
    downwards, across = (", then ".join(names) for names in (axes[:2], axes[2:]))
    content = f"""{origin_paragraph(run, result)}{meaning}{note}
<div class="explorer">
<script type="application/json">{data}</script>
<noscript><p>The explorer needs JavaScript.</p></noscript>
<div>
<div class="choices">{"".join(controls)}</div>
<div class="views">{views}</div>
<p class="answer" aria-live="polite"></p>
<div class="buttons">{buttons}</div>
<div class="sliders">{sliders}</div>
</div>
<div>
<h3>Rank of every action<b class="score"></b></h3>
<canvas class="map" role="img" aria-label=""></canvas>
<div class="legend scale"></div>
<p class="legend">Rows: {downwards}; columns: {across}. Click a cell to select its action.</p>
<h3>Distances from the prediction, nearest first</h3>
<svg class="profile" viewBox="0 0 360 200" role="img" aria-label=""></svg>
</div>
</div>"""
    return section("Explorer", Markup(content))


def _choice(name: str, kind: str, options: Sequence[tuple[str, str]]) -> str:
    """Return radio buttons; those of photographs show the image in place of text."""
    radios = "".join(
        f'<label><input type="radio" name="{escape(name)}-{kind}" value="{i}" aria-label="{escape(label)}"'
        f"{' checked' if i == 0 else ''}>{f'<span>{escape(text)}</span>' if text else '<canvas></canvas>'}</label>"
        for i, (text, label) in enumerate(options)
    )
    return f'<fieldset class="{kind}s"><legend>{kind}</legend>{radios}</fieldset>'


def _view(role: str, caption: str) -> str:
    return (
        f'<figure class="{role}"><canvas role="img" aria-label=""></canvas><figcaption>{caption}</figcaption></figure>'
    )


def _slider(name: str, axis: str, values: Sequence[float]) -> str:
    """Return a slider over the values with a line of distances; '' for a component with a single value."""
    if len(values) == 1:
        return ""
    mark = f"{escape(name)}-{axis}"
    return (
        f'<div class="slider"><label for="{mark}">{axis}</label><output for="{mark}"></output>'
        f'<input type="range" id="{mark}" name="{axis}" min="0" max="{len(values) - 1}" step="1" value="0">'
        f'<svg viewBox="0 0 100 28" preserveAspectRatio="none" aria-hidden="true"></svg></div>'
    )


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

"""The explorer: pick a photograph, move an action, see at once what the prediction retrieves. All of it is on the page.

Made from what the protocol `explore` (iwm/evaluation/explore.py) left; explorer.js beside this file does the rest.
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

from iwm.evaluation.bank import UNTOLD
from iwm.evaluation.mrr import TIE
from iwm.report.markup import section
from iwm.report.run_folder import ReportError, Run

FOR_THE_SCRIPT = ("bank", "chance", "columns", "side", "axes", "words", "sources")
"""Fields of explore.json that the script reads."""

MEANING = """<p>Choose a photograph and what is done to it, then tell the predictor an action. Which of the photograph's
{bank} views is nearest to what it predicts? Distances and ranks are those of MRR, computed beforehand from features
averaged over tokens; {same:.0%} of all ranks are exact, rounding moves the others by at most {most:g}.</p>"""

BUTTONS = {"nothing": "No change", "random": "Random action", "best": "Best action", "worst": "Worst action"}


VIEWS = {"source": "source", "true": "what the action makes", "retrieved": "what the prediction retrieves"}


def explorer(runs: Sequence[Run]) -> str:
    """Of one run's photographs. A comparison has none: each would bring a few megabytes; runs' own pages have them."""
    results = runs[0].of_protocol("explore") if len(runs) == 1 else {}
    if not results:
        return ""
    script = (resources.files("iwm.report") / "explorer.js").read_text()
    parts = "".join(_one(runs[0].folder / "eval", name, result) for name, result in results.items())
    return f"{parts}<script>{script}</script>"


def _one(folder: Path, name: str, result: dict[str, Any]) -> str:
    controls = (
        _choice(name, "photograph", [("", f"photograph {i + 1}") for i in range(len(result["photographs"]))]),
        _choice(name, "source", [(source["name"], source["name"]) for source in result["sources"]]),
    )
    data = json.dumps(_data(folder, result), separators=(",", ":")).replace("</", "<\\/")
    buttons = "".join(f'<button type="button" value="{value}">{text}</button>' for value, text in BUTTONS.items())
    sliders = "".join(_slider(name, axis, values) for axis, values in result["axes"].items())
    views = "".join(_view(role, caption) for role, caption in VIEWS.items())
    meaning = MEANING.format(bank=result["bank"], same=result["same_rank"], most=result["largest_difference"])
    untold = f"<p>{UNTOLD}</p>" if result["conditioning"] == "none" else ""
    content = f"""{meaning}{untold}
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
<p class="legend">Downwards brightness and, finer, contrast; across saturation and, finer, hue. Click to go there.</p>
<h3>Distances from the prediction, nearest first</h3>
<svg class="profile" viewBox="0 0 360 200" role="img" aria-label=""></svg>
</div>
</div>"""
    return section("Try an action", content)


def _choice(name: str, what: str, options: Sequence[tuple[str, str]]) -> str:
    """Radio buttons; a photograph's has its picture in the place of text."""
    radios = "".join(
        f'<label><input type="radio" name="{escape(name)}-{what}" value="{i}" aria-label="{escape(label)}"'
        f"{' checked' if i == 0 else ''}>{f'<span>{escape(text)}</span>' if text else '<canvas></canvas>'}</label>"
        for i, (text, label) in enumerate(options)
    )
    return f'<fieldset class="{what}s"><legend>{what}</legend>{radios}</fieldset>'


def _view(role: str, caption: str) -> str:
    return (
        f'<figure class="{role}"><canvas role="img" aria-label=""></canvas><figcaption>{caption}</figcaption></figure>'
    )


def _slider(name: str, axis: str, values: Sequence[float]) -> str:
    """A range over the values, with the line of distances that it moves along; nothing for what is never changed."""
    if len(values) == 1:
        return ""
    mark = f"{escape(name)}-{axis}"
    return (
        f'<div class="slider"><label for="{mark}">{axis}</label><output for="{mark}"></output>'
        f'<input type="range" id="{mark}" name="{axis}" min="0" max="{len(values) - 1}" step="1" value="0">'
        f'<svg viewBox="0 0 100 28" preserveAspectRatio="none" aria-hidden="true"></svg></div>'
    )


def _data(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What the script computes with: little-endian int16 points and float32 norms per photograph, base64."""
    path = _file(folder, result["points"])
    arrays = np.load(path)
    expected = (len(result["photographs"]), 1 + len(result["sources"]), result["bank"], result["components"])
    if arrays["points"].shape != expected:
        raise ReportError(f"{path} is not of the same making as its JSON; run the protocol explore again")
    photographs = [
        {
            "picture": f"data:image/webp;base64,{_base64(_file(folder, photograph['picture']).read_bytes())}",
            "scale": photograph["scale"],
            "points": _base64(points.astype("<i2").tobytes()),
            "norms": _base64(norms.astype("<f4").tobytes()),
        }
        for photograph, points, norms in zip(result["photographs"], arrays["points"], arrays["norms"], strict=True)
    ]
    return {**{key: result[key] for key in FOR_THE_SCRIPT}, "tie": TIE, "photographs": photographs}


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise ReportError(f"{path} is missing, which the explorer is made of; run the protocol explore again")
    return path


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()

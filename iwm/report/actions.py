"""How precisely the predictor acts: curves of single parameters, and what it can undo."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from iwm.evaluation import undo
from iwm.evaluation.bank import UNTOLD
from iwm.report.chart import Line, legend, line_chart
from iwm.report.markup import details, figure, grid, mean_and_error, section, table
from iwm.report.run_folder import Run

UNITS = {"hue": ("turned by, degrees", 360.0), "blur": ("sigma, pixels", 1.0)}
"""What a parameter's axis shows and its factor, where that is not the plain value."""

HEAD = ("parameter", "control", "rank correlation", "control", "exact", "control", "chance")


def grid_curves(run: Run) -> str:
    """One parameter at a time: the value retrieved against the true one, its rank correlation, and pictures."""
    parts = [_grids(run, result) for result in run.of_protocol("grids").values()]
    return section("One parameter at a time", "".join(parts)) if parts else ""


def _grids(run: Run, result: dict[str, Any]) -> str:
    meaning = (
        "The true value runs along the horizontal axis, that of the view nearest to the prediction along the vertical "
        f"one: mean over {result['images']} held-out images, shaded by a standard deviation. Of what is undone the "
        "source has the value and the retrieved view should have none. Control: shuffled actions, or the predictor "
        "not told what is to be undone. Exact: how often the nearest view is the right one."
    )
    charts = grid("".join(_chart(series) for series in result["series"]))
    pictures = [
        figure(run.folder / "eval" / each["picture"], "rows of views, true and retrieved", f"Photograph {each['key']}.")
        for each in result["pictures"]
    ]
    more = details("More photographs", "".join(pictures[1:])) if pictures[1:] else ""
    names = legend(("told", "control", "right"))
    scores = table(HEAD, (_scores(series) for series in result["series"]))
    return f"{_meaning(meaning, result)}{names}{charts}{scores}{''.join(pictures[:1])}{more}"


def _chart(series: dict[str, Any]) -> str:
    unit, factor = UNITS.get(series["op"], ("", 1.0))
    true = [value * factor for value in series["values"]]

    def line(name: str, values: Iterable[float], spread: Iterable[float] = ()) -> Line:
        points = [(x, y * factor) for x, y in zip(true, values, strict=True)]
        return Line(name, points, [half * factor for half in spread])

    lines = [
        *(line(name, series[name]["retrieved"], series[name]["deviation"]) for name in ("told", "control")),
        line("right", series["wanted"]),
    ]
    name = series["name"] + (f", {unit}" if unit else "") + ("" if series["trained"] else " (never trained)")
    correlation = f"{series['told']['correlation']['mean']:.2f}"
    return f'<div class="chart"><h3>{escape(name)}<b>{correlation}</b></h3>{line_chart(lines)}</div>'


def _scores(series: dict[str, Any]) -> str:
    both = (series["told"], series["control"])
    cells = [mean_and_error(part[score], 2) for score in ("correlation", "hits") for part in both]
    words = (series["name"], series["control"]["kind"])
    return "".join(f"<td>{cell}</td>" for cell in (*words, *cells, f"{1 / len(series['values']):.2f}"))


def undone(run: Run) -> str:
    """What the predictor can undo: MRR from corrupted sources, with controls and the ceiling."""
    parts = [_undone(run, result) for result in run.of_protocol("undo").values()]
    return section("Undoing corruptions", "".join(parts)) if parts else ""


def _undone(run: Run, result: dict[str, Any]) -> str:
    meaning = (
        "Mean reciprocal rank of the true copy when the source is corrupted and the action leads from it to the copy. "
        "Not told: the same when the action does not say what was done to the source. Shuffled: with another copy's "
        "action. Restored: rank of the clean image when the action undoes the corruption and does no more. "
        f"± standard error over {result['images']} held-out images; {result['queries']} of {result['bank']} copies "
        f"asked for; chance {result['chance']:.3f}."
    )
    head = ("source", "strength", *(name.replace("_", " ") for name in undo.SCORES))
    ops = [_row("clean, the ceiling", "", result["clean"])]
    strengths = []
    for op in result["ops"]:
        name = op["op"] if op["trained"] else f"{op['op']} (never trained)"
        several = len(op["strengths"]) > 1
        ops.append(_row(name, f"{len(op['strengths'])} strengths" if several else op["strengths"][0]["strength"], op))
        strengths += [_row(name, each["strength"], each) for each in op["strengths"] if several]
    picture = ""
    if result["picture"]:
        caption = (
            "Each op at its greatest strength: the source, what the prediction that undoes it and does no more "
            f"retrieves among {result['bank']} jittered copies and the clean image, and that image."
        )
        picture = figure(run.folder / "eval" / result["picture"], "sources, what was retrieved, and the truth", caption)
    by_strength = details("By strength", table(head, strengths)) if strengths else ""
    return f"{_meaning(meaning, result)}{table(head, ops)}{by_strength}{picture}"


def _row(name: str, strength: str, scores: dict[str, Any]) -> str:
    cells = (escape(name), escape(strength), *(mean_and_error(scores[score], 3) for score in undo.SCORES))
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _meaning(words: str, result: dict[str, Any]) -> str:
    told = f" {UNTOLD}" if result["conditioning"] == "none" else ""
    return f"<p>{escape(words)}{told}</p>"

"""Sections of the report on the world model: summary and mean reciprocal rank."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

from iwm.evaluation.mrr import WAYS, way_name
from iwm.evaluation.result_table import ResultTable, format_mean_stderr
from iwm.evaluation.settings import DISTANCES
from iwm.report.components import (
    details,
    html_table,
    number,
    section,
    stored_tables,
    table,
)
from iwm.report.provenance import kind_of_images, origin
from iwm.report.runs import RunResults


def summary_tiles(runs: Sequence[RunResults]) -> str:
    """Return the title and the main results: tiles for one run, a table for several."""
    return _tiles(runs[0]) if len(runs) == 1 else _comparison(runs)


def _tiles(run: RunResults) -> str:
    tiles = []
    name = _shared([run])
    if name is not None:
        result = run.evaluations[name]
        mrr, shuffled = (result[key]["pooled"]["teacher"] for key in ("mrr", "shuffled_actions"))
        tiles += [
            ("MRR, pooled", f"{mrr['mean']:.3f}", f"± {mrr['standard_error']:.3f}, {kind_of_images(result)}"),
            ("with shuffled actions", f"{shuffled['mean']:.3f}", f"chance {result['chance']:.3f}"),
        ]
    if "loss" in run.metrics:
        step, loss = run.metrics["loss"][-1]
        tiles.append(("loss", f"{loss:.3f}", f"at step {step:,.0f}"))
    if "images_per_second" in run.metrics:
        tiles.append(("images/s", _speed(run), "median of the run"))
    cards = "".join(
        f'<div class="tile"><span>{name}</span><b>{value}</b><small>{note}</small></div>' for name, value, note in tiles
    )
    return f'{_title("Image World Model · run", run.name)}<div class="tiles">{cards}</div>'


def _comparison(runs: Sequence[RunResults]) -> str:
    """Return a table with one row per run: scores, length, speed; the bar behind a score is scaled to the best run."""
    name = _shared(runs)
    results = {run.name: run.evaluations[name] for run in runs if name in run.evaluations} if name else {}
    best = max((result["mrr"]["pooled"]["teacher"]["mean"] for result in results.values()), default=1.0)
    rows = []
    for run in runs:
        result, loss = results.get(run.name), run.metrics.get("loss")
        cells = [f'<th scope="row">{escape(run.name)}</th>']
        cells += _scores(result, best) if result else ["<td></td>"] * 4
        cells.append(f"<td>{number(loss[-1][1])}</td><td>{loss[-1][0]:,.0f}</td>" if loss else "<td></td><td></td>")
        cells.append(f"<td>{_speed(run)}</td>")
        rows.append("".join(cells))
    head = ("run", "MRR, pooled", "per token", "shuffled actions", "chance", "loss", "steps", "images/s")
    title = _title("Image World Models · comparison", f"{len(runs)} runs")
    return f"{title}<section>{table(head, rows)}</section>"


def _scores(result: dict[str, Any], best: float) -> list[str]:
    pooled, per_token = (result["mrr"][distance]["teacher"] for distance in DISTANCES)
    return [
        f'<td class="bar" style="--share:{pooled["mean"] / best:.3f}">{_bold(pooled)}</td>',
        f"<td>{_bold(per_token)}</td>",
        f"<td>{_bold(result['shuffled_actions']['pooled']['teacher'])}</td>",
        f"<td>{result['chance']:.3f}</td>",
    ]


def _bold(score: dict[str, float]) -> str:
    mean, error = format_mean_stderr(score).split("±")
    return f"<b>{mean}</b> ± {error}"


def _shared(runs: Sequence[RunResults]) -> str | None:
    """Return the name of the MRR file that most runs have; ties go to `mrr`, then to the first name."""
    names = [name for run in runs for name in run.evaluations_of("mrr")]
    return min(names, key=lambda name: (-names.count(name), name != "mrr", name), default=None)


def _title(kind: str, name: str) -> str:
    return f"<header><p>{escape(kind)}</p><h1>{escape(name)}</h1></header>"


def _speed(run: RunResults) -> str:
    values = [value for _, value in run.metrics.get("images_per_second", [])]
    return number(round(statistics.median(values))) if values else ""


MEANING = """<p>Mean reciprocal rank of the true view among the jittered views of an image, by distance to the
prediction, ± standard error over images. Shuffled actions: predictions with another view's action. Teacher, student:
encoder of the clean image.</p>"""


def world_model(runs: Sequence[RunResults]) -> str:
    """Return MRR with its control: one row per distance and encoder for a single run, else one row per run."""
    names = sorted({name for run in runs for name in run.evaluations_of("mrr")})
    if not names:
        return ""
    tables = _of_one(runs[0], names) if len(runs) == 1 else "".join(_by_run(runs, name) for name in names)
    return section("Mean reciprocal rank", MEANING + tables)


def _of_one(run: RunResults, names: Sequence[str]) -> str:
    tables = []
    for name in names:
        result = run.evaluations[name]
        for stored in stored_tables(result):
            caption = f"{stored.caption}. {origin(run, result)}"
            tables.append(html_table(replace(stored, title=name, caption=caption)))
    return "".join(tables)


def _by_run(runs: Sequence[RunResults], name: str) -> str:
    """Return the table of one MRR file name, because runs may be evaluated on several banks."""
    rows = []
    for run in runs:
        result = run.evaluations.get(name)
        if result is not None:
            scores = [result["mrr"][distance][encoder] for distance, encoder in WAYS]
            scores.append(result["shuffled_actions"]["pooled"]["teacher"])
            images = f"{result['images']} {kind_of_images(result)}"
            rows.append(
                [run.name, *map(format_mean_stderr, scores), f"{result['chance']:.3f}", str(result["bank"]), images]
            )
    columns = ["run", *(way_name(*way) for way in WAYS), "shuffled actions, pooled", "chance", "bank", "images"]
    return details(name, html_table(ResultTable("Mean reciprocal rank ± standard error", columns, rows)))

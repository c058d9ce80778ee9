"""The figures a run is judged by: the headline, and MRR with its controls."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

from iwm.evaluation.bank import CONTEXTS, DISTANCES
from iwm.report.chart import number
from iwm.report.markup import details, mean_and_error, section, table
from iwm.report.run_folder import Run


def headline(runs: Sequence[Run]) -> str:
    """The name and the few most telling figures: of one run in large, of several in a table."""
    return _tiles(runs[0]) if len(runs) == 1 else _comparison(runs)


def _tiles(run: Run) -> str:
    tiles = []
    name = _shared([run])
    if name is not None:
        result = run.evaluations[name]
        own, shuffled = (result[key]["pooled"]["teacher"] for key in ("mrr", "shuffled_actions"))
        tiles += [
            ("MRR, pooled", f"{own['mean']:.3f}", f"± {own['standard_error']:.3f}, held-out images"),
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


def _comparison(runs: Sequence[Run]) -> str:
    """A row per run: its score, speed and length; a bar behind the score, the longest that of the best run."""
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
        f'<td class="bar" style="--share:{pooled["mean"] / best:.3f}">{mean_and_error(pooled)}</td>',
        f"<td>{mean_and_error(per_token)}</td>",
        f"<td>{mean_and_error(result['shuffled_actions']['pooled']['teacher'])}</td>",
        f"<td>{result['chance']:.3f}</td>",
    ]


def _shared(runs: Sequence[Run]) -> str | None:
    """The MRR that most runs have: `mrr` where another is as frequent, then the first by name."""
    names = [name for run in runs for name in run.of_protocol("mrr")]
    return min(names, key=lambda name: (-names.count(name), name != "mrr", name), default=None)


def _title(kind: str, name: str) -> str:
    return f"<header><p>{escape(kind)}</p><h1>{escape(name)}</h1></header>"


def _speed(run: Run) -> str:
    values = [value for _, value in run.metrics.get("images_per_second", [])]
    return number(round(statistics.median(values))) if values else ""


WAYS = [(distance, context) for distance in DISTANCES for context in CONTEXTS]
"""The ways that MRR is measured."""

MEANING = """<p>Mean reciprocal rank of the true copy among the jittered copies of a held-out image, by distance to
the prediction, ± standard error over images. Shuffled: predicted with another copy's action. Teacher, student: the
encoder that the clean image went through.</p>"""


def world_model(runs: Sequence[Run]) -> str:
    """MRR with its controls: of one run a row for each way to measure it, of several a row for each run."""
    names = sorted({name for run in runs for name in run.of_protocol("mrr")})
    if not names:
        return ""
    tables = (_by_way if len(runs) == 1 else _by_run)(runs, names)
    return section("Can the predictor apply an action?", MEANING + tables)


def _by_way(runs: Sequence[Run], names: Sequence[str]) -> str:
    head = ("distance, encoder", "MRR", "shuffled actions", "Recall@1", "chance")
    rows = []
    for name in names:
        result = runs[0].evaluations[name]
        about = f"{result['checkpoint']} · {result['images']} images, bank of {result['bank']}"
        rows.append(f'<th colspan="{len(head)}">{escape(name)}<small>{escape(about)}</small></th>')
        for distance, context in WAYS:
            scores = [result[part][distance][context] for part in ("mrr", "shuffled_actions")]
            cells = "".join(f"<td>{mean_and_error(score)}</td>" for score in scores)
            recall = result["recall"]["at_1"][distance][context]["mean"]
            rows.append(
                f"<td>{_way(distance, context)}</td>{cells}<td>{recall:.3f}</td><td>{result['chance']:.3f}</td>"
            )
    return table(head, rows)


def _by_run(runs: Sequence[Run], names: Sequence[str]) -> str:
    """A table for each evaluation by its file's name, for runs may be asked in several banks."""
    head = ("run", *(_way(*way) for way in WAYS), "shuffled, pooled", "chance", "bank")
    tables = []
    for name in names:
        rows = []
        for run in runs:
            result = run.evaluations.get(name)
            if result is not None:
                scores = [result["mrr"][distance][context] for distance, context in WAYS]
                scores.append(result["shuffled_actions"]["pooled"]["teacher"])
                cells = "".join(f"<td>{mean_and_error(score)}</td>" for score in scores)
                sizes = f"<td>{result['chance']:.3f}</td><td>{result['bank']}</td>"
                rows.append(f'<th scope="row">{escape(run.name)}</th>{cells}{sizes}')
        tables.append(details(name, table(head, rows)))
    return "".join(tables)


def _way(distance: str, context: str) -> str:
    return f"{distance.replace('_', ' ')}, {context}"

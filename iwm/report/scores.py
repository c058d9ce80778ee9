"""The figures a run is judged by: the headline, and MRR with its controls."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from iwm.evaluation.bank import CONTEXTS, DISTANCES
from iwm.report.chart import number
from iwm.report.markup import details, section, table
from iwm.report.run_folder import Run


def headline(runs: Sequence[Run]) -> str:
    """The name and the few most telling figures: of one run in large, of several in a table."""
    return _tiles(runs[0]) if len(runs) == 1 else _comparison(runs)


def _tiles(run: Run) -> str:
    tiles = []
    result = run.evaluations.get("mrr")
    if result is not None:
        own, shuffled = (result[key]["pooled"]["teacher"] for key in ("mrr", "shuffled_actions"))
        tiles += [
            ("MRR, pooled", f"{own['mean']:.3f}", f"± {own['standard_error']:.3f}, held-out images"),
            ("with shuffled actions", f"{shuffled['mean']:.3f}", f"chance {result['chance']:.3f}"),
        ]
    if "loss" in run.metrics:
        step, loss = run.metrics["loss"][-1]
        tiles.append(("loss", f"{loss:.3f}", f"at step {step:,.0f}"))
    if "images_per_second" in run.metrics:
        tiles.append(("images/s", number(round(_speed(run))), "median of the run"))
    cards = "".join(
        f'<div class="tile"><span>{name}</span><b>{value}</b><small>{note}</small></div>' for name, value, note in tiles
    )
    return f'{_title("Image World Model · run", run.name)}<div class="tiles">{cards}</div>'


HEADLINE = ("run", "MRR, pooled", "per token", "shuffled actions", "chance", "loss", "steps", "images/s")


def _comparison(runs: Sequence[Run]) -> str:
    scores = [run.evaluations["mrr"]["mrr"]["pooled"]["teacher"]["mean"] for run in runs if "mrr" in run.evaluations]
    rows = [_comparison_row(run, max(scores, default=1.0)) for run in runs]
    title = _title("Image World Models · comparison", f"{len(runs)} runs")
    return f"{title}<section>{table(HEADLINE, rows)}</section>"


def _comparison_row(run: Run, best: float) -> str:
    result = run.evaluations.get("mrr")
    cells = [f'<th scope="row">{escape(run.name)}</th>']
    if result is None:
        cells += ["<td></td>"] * 4
    else:
        own, shuffled = result["mrr"], result["shuffled_actions"]["pooled"]["teacher"]
        share = own["pooled"]["teacher"]["mean"] / best
        cells += [
            f'<td class="bar" style="--share:{share:.3f}">{_score(own["pooled"]["teacher"])}</td>',
            f"<td>{_score(own['per_token']['teacher'])}</td>",
            f"<td>{_score(shuffled)}</td>",
            f"<td>{result['chance']:.3f}</td>",
        ]
    loss = run.metrics.get("loss")
    cells.append(f"<td>{number(loss[-1][1])}</td><td>{loss[-1][0]:,.0f}</td>" if loss else "<td></td><td></td>")
    cells.append(f"<td>{number(round(_speed(run))) if 'images_per_second' in run.metrics else ''}</td>")
    return "".join(cells)


def _title(kind: str, name: str) -> str:
    return f"<header><p>{escape(kind)}</p><h1>{escape(name)}</h1></header>"


def _speed(run: Run) -> float:
    return statistics.median(value for _, value in run.metrics["images_per_second"])


def _score(score: dict[str, float]) -> str:
    return f"<b>{score['mean']:.3f}</b> ± {score['standard_error']:.3f}"


MRR_HEAD = ("distance", "clean image by", "MRR", "shuffled actions", "Recall@1", "chance")
MRR_MEANING = """<p>Mean reciprocal rank of the true copy among the jittered copies of a held-out image, by distance to
the prediction, ± standard error over images. Shuffled: predicted with another copy's action. Teacher, student: the
encoder that the clean image went through.</p>"""


def world_model(runs: Sequence[Run]) -> str:
    """MRR with its controls: a row for each distance and context of each evaluation."""
    tables = []
    for run in runs:
        rows = [row for name, result in run.of_protocol("mrr").items() for row in _mrr_rows(name, result)]
        if rows:
            tables.append((run.name, table(MRR_HEAD, rows)))
    if not tables:
        return ""
    content = tables[0][1] if len(runs) == 1 else "".join(details(name, rows) for name, rows in tables)
    return section("Can the predictor apply an action?", MRR_MEANING + content)


def _mrr_rows(name: str, result: dict[str, Any]) -> Iterable[str]:
    about = f"{result['checkpoint']} · {result['images']} images, bank of {result['bank']}"
    yield f'<th colspan="{len(MRR_HEAD)}">{escape(name)}<small>{escape(about)}</small></th>'
    for distance in DISTANCES:
        for context in CONTEXTS:
            scores = [part[distance][context] for part in (result["mrr"], result["shuffled_actions"])]
            cells = "".join(f"<td>{_score(score)}</td>" for score in scores)
            recall = result["recall"]["at_1"][distance][context]["mean"]
            words = f"<td>{distance.replace('_', ' ')}</td><td>{context}</td>"
            yield f"{words}{cells}<td>{recall:.3f}</td><td>{result['chance']:.3f}</td>"

"""The figures a run is judged by: the headline, and MRR with its controls."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from html import escape
from typing import Any

from iwm.evaluation.mrr import CONTEXTS, DISTANCES
from iwm.report.chart import number
from iwm.report.markup import section
from iwm.report.run_folder import Run


def headline(run: Run) -> str:
    """The run's name and its few most telling figures."""
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
        speed = statistics.median(value for _, value in run.metrics["images_per_second"])
        tiles.append(("images/s", number(round(speed)), "median of the run"))
    cards = "".join(
        f'<div class="tile"><span>{name}</span><b>{value}</b><small>{note}</small></div>' for name, value, note in tiles
    )
    title = f"<header><p>Image World Model · run</p><h1>{escape(run.name)}</h1></header>"
    return f'{title}<div class="tiles">{cards}</div>'


MRR_HEAD = ("distance", "clean image by", "MRR", "shuffled actions", "Recall@1", "chance")
MRR_MEANING = """<p>Mean reciprocal rank of the true copy among the jittered copies of a held-out image, by distance to
the prediction, ± standard error over images. Shuffled: predicted with another copy's action. Teacher, student: the
encoder that the clean image went through.</p>"""


def world_model(run: Run) -> str:
    """MRR with its controls: a row for each distance and context of each evaluation."""
    results = run.of_protocol("mrr")
    rows = [row for name, result in results.items() for row in _mrr_rows(name, result)]
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in MRR_HEAD)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return section("Can the predictor apply an action?", MRR_MEANING + table)


def _mrr_rows(name: str, result: dict[str, Any]) -> Iterable[str]:
    about = f"{result['checkpoint']} · {result['images']} images, bank of {result['bank']}"
    yield f'<th colspan="{len(MRR_HEAD)}">{escape(name)}<small>{escape(about)}</small></th>'
    for distance in DISTANCES:
        for context in CONTEXTS:
            scores = [part[distance][context] for part in (result["mrr"], result["shuffled_actions"])]
            cells = "".join(f"<td><b>{score['mean']:.3f}</b> ± {score['standard_error']:.3f}</td>" for score in scores)
            recall = result["recall"]["at_1"][distance][context]["mean"]
            words = f"<td>{distance.replace('_', ' ')}</td><td>{context}</td>"
            yield f"{words}{cells}<td>{recall:.3f}</td><td>{result['chance']:.3f}</td>"

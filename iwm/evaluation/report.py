"""RUN/report.html: one self-contained page of what a run did, made from what it left on disk and nothing else.

    python -m iwm.evaluation.report RUN

A section is a function from `Run` to HTML that gives "" where its material is missing, so the page holds only what was
run. To add one, write it and name it in SECTIONS; the page's looks are in report.html beside this file.
"""

from __future__ import annotations

import base64
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from iwm.evaluation.chart import Line, line_chart, number
from iwm.evaluation.mrr import CONTEXTS, DISTANCES
from iwm.evaluation.run_folder import ReportError, Run, read_run
from shards.atomic import write_atomically


def write_report(folder: Path) -> Path:
    """Make RUN/report.html anew. Raises ReportError as `read_run` does."""
    run = read_run(folder)
    template = Template((resources.files("iwm.evaluation") / "report.html").read_text())
    body = "\n".join(section(run) for section in SECTIONS)
    path = folder / "report.html"
    write_atomically(path, template.substitute(title=escape(run.name), body=body).encode())
    return path


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
    return _section("Can the predictor apply an action?", MRR_MEANING + table)


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


def retrieval_picture(run: Run) -> str:
    """What predictions retrieve."""
    figures = [
        _figure(run.folder / "eval" / result["picture"], result) for result in run.of_protocol("retrieval").values()
    ]
    return _section("What the predictions look like", "".join(figures)) if figures else ""


def _figure(picture: Path, result: dict[str, Any]) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    return (
        f'<figure><img alt="photographs, what was retrieved, and the truth" src="data:image/png;base64,{data}">'
        f"<figcaption>The predictor is told an action; of {result['bank']} jittered copies, the one nearest to its "
        f"output is shown beside the true one. Chosen at random, seed {result['seed']}.</figcaption></figure>"
    )


CHARTS = {
    "Loss": ("loss",),
    "MRR, small bank": ("mrr_pooled", "mrr_per_token", "mrr_shuffled"),
    "RankMe": ("rankme",),
    "Feature standard deviation": ("feature_std",),
    "Images/s": ("images_per_second",),
    "Data wait, share of the time": ("data_wait",),
    "Learning rate": ("lr",),
}
"""Charts in their order: title and fields of metrics.jsonl. Other fields get a chart of their own, folded away."""

CHANCE = "mrr_chance"
"""The field that is drawn as a level in the chart of MRR."""

FROM_ZERO = ("Images/s",)
"""Charts whose value axis starts at 0 however little the values vary."""


def curves(run: Run) -> str:
    """Every metric over the steps."""
    if not run.metrics:
        return ""
    named = {CHANCE, *(name for names in CHARTS.values() for name in names)}
    others = {name.replace("_", " "): (name,) for name in sorted(run.metrics) if name not in named}
    shown = "".join(_chart(run, title, names) for title, names in CHARTS.items())
    folded = _details("All other metrics", _grid("".join(_chart(run, *each) for each in others.items())))
    return _section("Training", _grid(shown) + (folded if others else ""))


def _chart(run: Run, title: str, names: tuple[str, ...]) -> str:
    lines = [Line(name.replace("_", " "), run.metrics[name]) for name in names if name in run.metrics]
    if not lines:
        return ""
    marks = "".join(f'<span><i class="s{i}"></i>{escape(line.name)}</span>' for i, line in enumerate(lines, start=1))
    legend = f'<div class="legend">{marks}</div>' if len(lines) > 1 else ""
    level = ("chance", run.metrics[CHANCE][-1][1]) if "mrr_pooled" in names and CHANCE in run.metrics else None
    svg = line_chart(lines, level, from_zero=title in FROM_ZERO)
    last = number(lines[0].points[-1][1])
    return f'<div class="chart"><h3>{escape(title)}<b>{last}</b></h3>{legend}{svg}</div>'


HOW = ("checkpoint", "data", "settings", "seed", "device", "precision", "versions", "seconds")
"""Fields of an evaluation that say how it was made."""


def configuration(run: Run) -> str:
    """The resolved configuration and the versions, folded away."""
    parts = []
    if run.config is not None:
        parts.append(_details("Configuration", f"<pre>{escape(run.config)}</pre>"))
    for name, result in run.evaluations.items():
        how = json.dumps({key: result[key] for key in HOW if key in result}, indent=1)
        parts.append(_details(f"Evaluation {name}: settings and versions", f"<pre>{escape(how)}</pre>"))
    return _section("How it was made", "".join(parts)) if parts else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _grid(charts: str) -> str:
    return f'<div class="charts">{charts}</div>'


SECTIONS: tuple[Callable[[Run], str], ...] = (headline, world_model, retrieval_picture, curves, configuration)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m iwm.evaluation.report RUN")
    try:
        print(write_report(Path(sys.argv[1])))
    except (ReportError, OSError) as problem:
        sys.exit(f"iwm.evaluation.report: {problem}")

"""Sections of the report on the world model: summary, MRR, figures and tables of all evaluators."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from dali_pipelines.augmentations import OPS
from iwm.evaluation.bank import UNCONDITIONED_NOTE
from iwm.evaluation.mrr import WAYS, way_name
from iwm.evaluation.result_table import ResultTable, format_mean_stderr
from iwm.evaluation.settings import DISTANCES
from iwm.report.components import (
    ChartLine,
    chart_grid,
    details,
    figure,
    html_table,
    legend,
    line_chart,
    number,
    section,
    stored_tables,
    table,
)
from iwm.report.provenance import kind_of_images, origin, origin_paragraph
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


def _picture(run: RunResults, name: str, alt: str, caption: str) -> str:
    """Return the figure of a file in the run's eval folder."""
    return figure(run.folder / "eval" / name, alt, caption)


def _section(run: RunResults, title: str, evaluator: str, content: Callable[[RunResults, dict[str, Any]], str]) -> str:
    """Return the section of an evaluator's results, each by `content`; '' where there are none."""
    parts = [origin_paragraph(run, result) + content(run, result) for result in run.evaluations_of(evaluator).values()]
    return section(title, "".join(parts)) if parts else ""


def retrieval_picture(run: RunResults) -> str:
    """Return the retrieval figures: random images and, folded, the best and worst prediction of each image."""
    return _section(run, "Retrieval", "retrieval", _pictures)


def _pictures(run: RunResults, result: dict[str, Any]) -> str:
    bank = result["bank"]
    caption = (
        f"The view nearest to the prediction, among {bank} jittered views, next to the true view. Images and actions "
        f"are random (seed {result['seed']})."
    )
    if result.get("conditioning") == "none":
        caption += f" {UNCONDITIONED_NOTE}"
    alt = "images, retrieved views and true views"
    chosen = _picture(run, result["picture"], alt, caption)
    if "extremes" not in result:  # results of older versions
        return chosen
    caption = f"Not random: the best and the worst of all {bank} predictions for each of these images."
    extremes = _picture(run, result["extremes"]["picture"], alt, caption)
    return chosen + details("Best and worst prediction of each image", extremes)


def nearest_neighbours(run: RunResults) -> str:
    """Return the accuracy of k-nearest-neighbour classification."""
    return _section(run, "Nearest neighbours", "knn", lambda _, result: _tables(result))


def _tables(result: dict[str, Any]) -> str:
    return "".join(map(html_table, stored_tables(result)))


def similarity_matrix(run: RunResults) -> str:
    """Return the similarity matrix (figure S3) and its scores."""

    def content(run: RunResults, result: dict[str, Any]) -> str:
        caption = (
            f"Cosine similarity of the {result['encoder']}'s pooled features, {len(result['shown'])} images, "
            f"{result['augmentations']} augmented views of each (no crop). Uniform yellow squares on the diagonal: "
            "invariant features. Structure within the squares: features depend on the augmentation. A smaller "
            "variance within images means more invariance."
        )
        return _tables(result) + _picture(run, result["picture"], "matrix of cosine similarities", caption)

    return _section(run, "Similarity of augmented views", "similarity", content)


def marginalised(run: RunResults) -> str:
    """Return the results of marginalised representations (table S6, figure S4)."""

    def content(run: RunResults, result: dict[str, Any]) -> str:
        caption = "Some jittered views of an image; below them, the views nearest to the mean of its predictions."
        return _tables(result) + _picture(run, result["picture"], "views and nearest neighbours", caption)

    return _section(run, "Marginalised representations", "marginalisation", content)


def patch_maps(run: RunResults) -> str:
    """Return the PCA and attention maps of patch features."""

    def content(run: RunResults, result: dict[str, Any]) -> str:
        colours = (
            "The first three principal components of the teacher's patch features as red, green and blue; equal "
            f"colours are equal features. They explain {result['explained']:.0%} of the variance. Action: "
            f"{result['action']}."
        )
        attention = (
            "Last block of the teacher: attention of the marked patch to the others, and attention that each patch "
            "receives from all patches, averaged and by head. 1 is an equal share."
        )
        return _picture(run, result["picture"], "maps of principal components", colours) + _picture(
            run, result["attention_picture"], "maps of attention", attention
        )

    return _section(run, "Patch features", "feature-maps", content)


UNITS = {op.name: (op.unit, op.unit_scale) for op in OPS if op.unit}
"""Unit and factor of a parameter's axis, where it does not show the plain value."""


def sweep_section(run: RunResults) -> str:
    """Return the parameter sweeps: retrieved over true value, rank correlation and figures."""
    return _section(run, "Parameter sweeps", "parameter-sweep", _sweeps)


def _sweeps(run: RunResults, result: dict[str, Any]) -> str:
    meaning = (
        "Horizontal axis: true value. Vertical axis: value of the view nearest to the prediction, mean over "
        "images; the band is one standard deviation. In undo sweeps, the source has the value and the target is the "
        "clean image. Control: shuffled actions; in undo sweeps, an action that does not describe the source's "
        "augmentation. Exact: share of predictions whose nearest view is the target. The number above each chart is "
        "the rank correlation."
    )
    charts = chart_grid("".join(_chart(series) for series in result["series"]))
    pictures = [
        _picture(run, item["picture"], "rows of true and retrieved views", f"Image {item['key']}.")
        for item in result["pictures"]
    ]
    more = details("More images", "".join(pictures[1:])) if pictures[1:] else ""
    names = legend(("with action", "control", "target"))
    return f"<p>{meaning}</p>{names}{charts}{_tables(result)}{''.join(pictures[:1])}{more}"


def _chart(series: dict[str, Any]) -> str:
    unit, factor = UNITS.get(series["op"], ("", 1.0))
    true = [value * factor for value in series["values"]]

    def line(name: str, values: Iterable[float], spread: Iterable[float] = ()) -> ChartLine:
        points = [(x, y * factor) for x, y in zip(true, values, strict=True)]
        return ChartLine(name, points, [half * factor for half in spread])

    lines = [
        line("with action", series["with_action"]["retrieved"], series["with_action"]["deviation"]),
        line("control", series["control"]["retrieved"], series["control"]["deviation"]),
        line("target", series["target"]),
    ]
    name = series["name"] + (f", {unit}" if unit else "") + ("" if series["trained"] else " (never trained)")
    correlation = f"{series['with_action']['correlation']['mean']:.2f}"
    return f'<div class="chart"><h3>{escape(name)}<b>{correlation}</b></h3>{line_chart(lines)}</div>'


def corruption_section(run: RunResults) -> str:
    """Return MRR from corrupted sources, with controls and the upper bound."""
    return _section(run, "Undoing corruptions", "corruptions", _corruptions)


def _corruptions(run: RunResults, result: dict[str, Any]) -> str:
    meaning = (
        "Mean reciprocal rank of the true view from a corrupted source, ± standard error over images. With action: the "
        "action leads from the corrupted source to the view. Without action: the action does not describe the "
        "corruption. Shuffled actions: with another view's action. Restored: reciprocal rank of the clean image when "
        "the action only undoes the corruption."
    )
    ops, *strengths = map(html_table, stored_tables(result))
    picture = ""
    if result["picture"]:
        caption = (
            "Each corruption at its greatest strength: the source; the view nearest to the prediction that only undoes "
            f"it, among {result['bank']} jittered views and the clean image; the clean image."
        )
        picture = _picture(run, result["picture"], "sources, retrieved views and clean images", caption)
    by_strength = details("By strength", "".join(strengths)) if strengths else ""
    return f"<p>{escape(meaning)}</p>{ops}{by_strength}{picture}"

"""Sections of the report on the world model's evaluators: figures and tables of each but MRR."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from markupsafe import Markup

from dali_pipelines.augmentations import OPS
from iwm.evaluation.bank import UNCONDITIONED_NOTE
from iwm.report.components import (
    ChartLine,
    chart_card,
    chart_grid,
    details,
    figure,
    html_table,
    legend,
    line_chart,
    section,
    stored_tables,
)
from iwm.report.provenance import origin_paragraph
from iwm.report.runs import RunResults


def _picture(run: RunResults, name: str, alt: str, caption: str) -> Markup:
    """Return the figure of a file in the run's eval folder."""
    return figure(run.folder / "eval" / name, alt, caption)


def _section(
    run: RunResults, title: str, evaluator: str, content: Callable[[RunResults, dict[str, Any]], Markup]
) -> Markup:
    """Return the section of an evaluator's results, each by `content`; '' where there are none."""
    parts = [origin_paragraph(run, result) + content(run, result) for result in run.evaluations_of(evaluator).values()]
    return section(title, Markup().join(parts)) if parts else Markup()


def retrieval_picture(run: RunResults) -> Markup:
    """Return the retrieval figures: random images and, folded, the best and worst prediction of each image."""
    return _section(run, "Retrieval", "retrieval", _pictures)


def _pictures(run: RunResults, result: dict[str, Any]) -> Markup:
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


def nearest_neighbours(run: RunResults) -> Markup:
    """Return the accuracy of k-nearest-neighbour classification."""
    return _section(run, "Nearest neighbours", "knn", lambda _, result: _tables(result))


def _tables(result: dict[str, Any]) -> Markup:
    return Markup().join(map(html_table, stored_tables(result)))


def similarity_matrix(run: RunResults) -> Markup:
    """Return the similarity matrix (figure S3) and its scores."""

    def content(run: RunResults, result: dict[str, Any]) -> Markup:
        caption = (
            f"Cosine similarity of the {result['encoder']}'s pooled features, {len(result['shown'])} images, "
            f"{result['augmentations']} augmented views of each (no crop). Uniform yellow squares on the diagonal: "
            "invariant features. Structure within the squares: features depend on the augmentation. A smaller "
            "variance within images means more invariance."
        )
        return _tables(result) + _picture(run, result["picture"], "matrix of cosine similarities", caption)

    return _section(run, "Similarity of augmented views", "similarity", content)


def marginalised(run: RunResults) -> Markup:
    """Return the results of marginalised representations (table S6, figure S4)."""

    def content(run: RunResults, result: dict[str, Any]) -> Markup:
        caption = "Some jittered views of an image; below them, the views nearest to the mean of its predictions."
        return _tables(result) + _picture(run, result["picture"], "views and nearest neighbours", caption)

    return _section(run, "Marginalised representations", "marginalisation", content)


def patch_maps(run: RunResults) -> Markup:
    """Return the PCA and attention maps of patch features."""

    def content(run: RunResults, result: dict[str, Any]) -> Markup:
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


def sweep_section(run: RunResults) -> Markup:
    """Return the parameter sweeps: retrieved over true value, rank correlation and figures."""
    return _section(run, "Parameter sweeps", "parameter-sweep", _sweeps)


def _sweeps(run: RunResults, result: dict[str, Any]) -> Markup:
    meaning = (
        "Horizontal axis: true value. Vertical axis: value of the view nearest to the prediction, mean over "
        "images; the band is one standard deviation. In undo sweeps, the source has the value and the target is the "
        "clean image. Control: shuffled actions; in undo sweeps, an action that does not describe the source's "
        "augmentation. Exact: share of predictions whose nearest view is the target. The number above each chart is "
        "the rank correlation."
    )
    charts = chart_grid(Markup().join(_chart(series) for series in result["series"]))
    pictures = [
        _picture(run, item["picture"], "rows of true and retrieved views", f"Image {item['key']}.")
        for item in result["pictures"]
    ]
    more = details("More images", Markup().join(pictures[1:])) if pictures[1:] else Markup()
    names = legend(("with action", "control", "target"))
    return Markup("<p>{}</p>{}{}{}{}{}").format(
        meaning, names, charts, _tables(result), Markup().join(pictures[:1]), more
    )


def _chart(series: dict[str, Any]) -> Markup:
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
    return chart_card(name, line_chart(lines, x_title="true value", y_title="retrieved value"), value=correlation)


def corruption_section(run: RunResults) -> Markup:
    """Return MRR from corrupted sources, with controls and the upper bound."""
    return _section(run, "Undoing corruptions", "corruptions", _corruptions)


def _corruptions(run: RunResults, result: dict[str, Any]) -> Markup:
    meaning = (
        "Mean reciprocal rank of the true view from a corrupted source, ± standard error over images. With action: the "
        "action leads from the corrupted source to the view. Without action: the action does not describe the "
        "corruption. Shuffled actions: with another view's action. Restored: reciprocal rank of the clean image when "
        "the action only undoes the corruption."
    )
    ops, *strengths = map(html_table, stored_tables(result))
    picture = Markup()
    if result["picture"]:
        caption = (
            "Each corruption at its greatest strength: the source; the view nearest to the prediction that only undoes "
            f"it, among {result['bank']} jittered views and the clean image; the clean image."
        )
        picture = _picture(run, result["picture"], "sources, retrieved views and clean images", caption)
    by_strength = details("By strength", Markup().join(strengths)) if strengths else Markup()
    return Markup("<p>{}</p>{}{}{}").format(meaning, ops, by_strength, picture)

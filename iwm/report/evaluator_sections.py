"""Sections of the report on the world model's evaluators: figures and tables of each but MRR."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import mean
from typing import Any

from markupsafe import Markup

from dali_pipelines.augmentations import OPS
from iwm.evaluation.settings import DISTANCES
from iwm.report.components import (
    ChartLine,
    chart_card,
    chart_grid,
    details,
    html_table,
    legend,
    line_chart,
    paragraphs,
    section,
    stored_tables,
)
from iwm.report.picture_grid import figures
from iwm.report.provenance import TITLES, origin_paragraph
from iwm.report.runs import RunResults

CLEARLY = 2.0
"""Standard errors by which a score exceeds its control where it is called higher."""


def evaluator_section(
    run: RunResults, evaluator: str, content: Callable[[RunResults, dict[str, Any]], Markup]
) -> Markup:
    """Return the section of an evaluator's results, each by `content`; '' where there are none."""
    parts = [origin_paragraph(run, result) + content(run, result) for result in run.evaluations_of(evaluator).values()]
    return section(TITLES[evaluator], Markup().join(parts)) if parts else Markup()


def retrieval_picture(run: RunResults) -> Markup:
    """Return the retrieval figures: random images and, folded, the best and worst prediction of each image."""
    return evaluator_section(run, "retrieval", lambda run, result: _failed_photographs(result) + figures(run, result))


def _failed_photographs(result: dict[str, Any]) -> Markup:
    """Name the photographs whose random actions have reciprocal ranks of chance or less; '' where there are none."""
    failed = []
    for photograph in result["photographs"]:
        ranks = [shown["rank"] for shown in photograph["actions"]]
        if mean(1 / rank for rank in ranks) <= result["chance"]:
            failed.append(f"{photograph['key']} (ranks {', '.join(f'{rank:g}' for rank in ranks)})")
    if not failed:
        return Markup()
    text = (
        f"Retrieval fails for {', '.join(failed)}: on average over the actions shown, the true view is ranked no "
        "better than by chance."
    )
    return paragraphs([text], linked=True)


def nearest_neighbours(run: RunResults) -> Markup:
    """Return the accuracy of k-nearest-neighbour classification."""
    return evaluator_section(run, "knn", lambda _, result: _tables(result))


def _tables(result: dict[str, Any]) -> Markup:
    return Markup().join(map(html_table, stored_tables(result)))


def _tables_and_figures(run: RunResults, result: dict[str, Any]) -> Markup:
    return _tables(result) + figures(run, result)


def similarity_matrix(run: RunResults) -> Markup:
    """Return the similarity matrix (figure S3) and its scores."""
    return evaluator_section(run, "similarity", _tables_and_figures)


def marginalised(run: RunResults) -> Markup:
    """Return the results of marginalised representations (table S6, figure S4)."""
    return evaluator_section(run, "marginalisation", _tables_and_figures)


def patch_maps(run: RunResults) -> Markup:
    """Return the PCA and attention maps of patch features."""
    return evaluator_section(run, "feature-maps", figures)


UNITS = {op.name: (op.unit, op.unit_scale) for op in OPS if op.unit}
"""Unit and factor of a parameter's axis, where it does not show the plain value."""


LINES = ("with action", "control")
"""Lines of a sweep's chart, in their order."""


def sweep_section(run: RunResults) -> Markup:
    """Return the parameter sweeps: retrieved over true value, rank correlation and figures."""
    return evaluator_section(run, "parameter-sweep", _sweeps)


def _sweeps(run: RunResults, result: dict[str, Any]) -> Markup:
    meaning = (
        "Retrieved value: that of the view nearest to the prediction, mean over images; the band is one standard "
        "deviation. In undo sweeps, the source has the value, and the target is the clean image. Control: shuffled "
        "actions; in undo sweeps, an action that does not describe the source's augmentation. Above each chart: the "
        "rank correlation; in undo sweeps the exact share, of predictions whose nearest view is the target."
    )
    charts = chart_grid(Markup().join(map(_chart, result["series"])))
    text, names = paragraphs([meaning], linked=True), legend(LINES)
    return text + names + charts + paragraphs(_low_scores(result)) + _tables(result) + figures(run, result)


def _headline(series: dict[str, Any]) -> tuple[str, str]:
    """Return name and key of the score that says whether a sweep succeeds.

    The retrieved values of a perfect undo sweep are all equal, so it has no rank correlation.
    """
    return ("exact", "hits") if series["undo"] else ("correlation", "correlation")


def _low_scores(result: dict[str, Any]) -> list[str]:
    """Return a sentence on series that were never trained, and one on trained series that are like their control."""
    trained = [series for series in result["series"] if series["trained"]]
    never = [series["name"] for series in result["series"] if not series["trained"]]
    like_control = [series["name"] for series in trained if not _exceeds_control(series)]
    texts = []
    if never:
        texts.append(
            f"Never trained: {', '.join(never)}. The run's views never varied these parameters, so a score "
            "like that of the control is expected."
        )
    if like_control and result["conditioning"] != "none":
        texts.append(
            f"Like the control: {', '.join(like_control)}. The score above the chart is less than {CLEARLY:g} standard "
            "errors higher than the control's."
        )
    return texts


def _exceeds_control(series: dict[str, Any]) -> bool:
    return _exceeds(*(series[part][_headline(series)[1]] for part in ("with_action", "control")))


def _exceeds(own: dict[str, float], control: dict[str, float]) -> bool:
    """Return True where a score is clearly higher than its control."""
    error = math.hypot(own["standard_error"], control["standard_error"])
    return own["mean"] - control["mean"] > CLEARLY * error


def _chart(series: dict[str, Any]) -> Markup:
    unit, factor = UNITS.get(series["op"], ("", 1.0))
    true = [value * factor for value in series["values"]]

    def line(name: str, values: Iterable[float], spread: Iterable[float] = ()) -> ChartLine:
        points = [(x, y * factor) for x, y in zip(true, values, strict=True)]
        return ChartLine(name, points, [half * factor for half in spread])

    lines = [
        line(LINES[0], series["with_action"]["retrieved"], series["with_action"]["deviation"]),
        line(LINES[1], series["control"]["retrieved"], series["control"]["deviation"]),
    ]
    name = series["name"] if series["trained"] else f"{series['name']} (never trained)"
    # An undo sweep has one target, the clean image; otherwise the target of a value is the value.
    reference, diagonal = (("ideal", series["target"][0] * factor), "") if series["undo"] else (None, "ideal")
    words, key = _headline(series)
    x_title, y_title = (f"{side} value, {unit}" if unit else f"{side} value" for side in ("true", "retrieved"))
    chart = line_chart(lines, reference, x_title=x_title, y_title=y_title, diagonal=diagonal)
    return chart_card(name, chart, value=f"{words} {series['with_action'][key]['mean']:.2f}")


def corruption_section(run: RunResults) -> Markup:
    """Return MRR from corrupted sources, with controls and the upper bound."""
    return evaluator_section(run, "corruptions", _corruptions)


def _corruptions(run: RunResults, result: dict[str, Any]) -> Markup:
    meaning = (
        "MRR of the true view from a corrupted source, ± standard error over images. With action: the action leads "
        "from the corrupted source to the view. Without action: the action does not describe the corruption. Shuffled "
        "actions: with another view's action. Restored: reciprocal rank of the clean image when the action only undoes "
        "the corruption. Untrained: the run's sources never had this corruption."
    )
    ops, *strengths = map(html_table, stored_tables(result))
    by_strength = details("By strength", Markup().join(strengths)) if strengths else Markup()
    return paragraphs([meaning], linked=True) + ops + by_strength + figures(run, result)


def composition_section(run: RunResults) -> Markup:
    """Return two predictions in a row against one, an action and its inverse, and charts of an action in steps."""
    return evaluator_section(run, "composition", _composition)


def _composition(run: RunResults, result: dict[str, Any]) -> Markup:
    meaning = (
        "x is the clean image, y and z are jittered views of it; a leads from x to y, b from y to z, ab from x to z, "
        "and a⁻¹ back from y to x. In two passes the first prediction is the predictor's input for the second action: "
        "they should be as good as one pass with ab, and a, then a⁻¹ should give the features of x. The encoder's "
        "features of y show what the second action reaches without errors of the first; target features of y "
        "re-entered show the loss by re-entry alone. A distance above 1 to the goal is farther than doing nothing, "
        "also where the true view is found: a prediction errs in more than what the action changes."
    )
    composed, undone, chain = map(html_table, stored_tables(result))
    charts = chart_grid(Markup().join(_chain_chart(result, *chart) for chart in CHAIN_CHARTS))
    text = paragraphs([meaning, *_not_composed(result)], linked=True)
    return text + composed + undone + chain + legend([name.replace("_", " ") for name in DISTANCES]) + charts


CHAIN_CHARTS = (("MRR", "mrr"), ("distance to z", "relative_distance"))
"""Titles and keys of the measures that are drawn over the number of passes."""


def _chain_chart(result: dict[str, Any], title: str, measure: str) -> Markup:
    lines = [
        ChartLine(
            distance.replace("_", " "),
            [(float(k), scores[measure][distance]["mean"]) for k, scores in result["chain"].items()],
            [scores[measure][distance]["standard_error"] for scores in result["chain"].values()],
        )
        for distance in DISTANCES
    ]
    reference = ("chance", result["chance"]) if measure == "mrr" else ("doing nothing", 1.0)
    return chart_card(title, line_chart(lines, reference, x_title="passes", y_title=title))


def _not_composed(result: dict[str, Any]) -> list[str]:
    """Name what does not clearly exceed its control, by pooled MRR; nothing for a model that receives no action."""
    failed = [
        words
        for part, words in (("composition", "two actions in a row"), ("undoing", "an action and its inverse"))
        if not _exceeds(result[part]["two_passes"]["mrr"]["pooled"], result[part]["other_action"]["mrr"]["pooled"])
    ]
    if not failed or result["conditioning"] == "none":
        return []
    return [
        f"Like the control: {' and '.join(failed)}. Pooled MRR is less than {CLEARLY:g} standard errors higher than "
        "with another pair's action."
    ]

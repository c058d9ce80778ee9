"""The page's curves keep their band inside and show what a control is; what was not run is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from iwm.evaluation.composition import COMPOSITION, UNDOING
from iwm.evaluation.settings import DISTANCES
from iwm.report.components import ChartLine, line_chart
from iwm.report.evaluator_sections import composition_section, corruption_section, retrieval_picture, sweep_section
from iwm.report.inferred_actions import inferred_actions
from iwm.report.runs import RunResults
from tests.report.conftest import with_tables
from tests.report.written_figures import inferred_actions_result


def _run(folder: Path, **evaluations: dict[str, Any]) -> RunResults:
    return RunResults(name="run", folder=folder, config=None, metrics={}, evaluations=evaluations)


def _score(value: float) -> dict[str, float]:
    return {"mean": value, "standard_error": 0.02}


def _grids() -> dict[str, Any]:
    part = {"retrieved": [0.7, 1.0, 1.2], "deviation": [0.1] * 3, "correlation": _score(0.87), "hits": _score(0.41)}
    series = {
        "name": "hue",
        "op": "hue",
        "undo": False,
        "trained": False,
        "values": [-0.1, 0.0, 0.1],
        "target": [-0.1, 0.0, 0.1],
        "with_action": part,
        "control": {"kind": "shuffled actions", **part, "correlation": _score(0.013)},
    }
    how = {"images": 5, "distance": "pooled", "context": "teacher", "conditioning": "none"}
    return with_tables({"protocol": "parameter-sweep", **how, "figures": [], "series": [series]})


def test_a_curve_shows_its_score_its_control_and_what_was_never_trained(tmp_path: Path) -> None:
    html = sweep_section(_run(tmp_path, grids=_grids()))
    for words in (
        "<b>correlation 0.87</b>",
        "0.01",
        "shuffled actions",
        "never trained",
        "degrees",
        "by construction",
        "polygon",
    ):
        assert words in html
    svg = html[html.index('<svg viewBox="0 0 360') : html.index("</svg></div>") + len("</svg>")]
    band = ElementTree.fromstring(svg).find("polygon").attrib["points"].split()
    assert len(band) == 6


def test_a_band_stays_inside_the_chart() -> None:
    svg = line_chart([ChartLine("x", [(0.6, 1.0), (1.0, 2.0), (1.4, 2.5)], [1.0, 0.5, 3.0])])
    root = ElementTree.fromstring(svg)
    width, height = (float(each) for each in root.attrib["viewBox"].split()[2:])
    for x, y in (pair.split(",") for pair in root.find("polygon").attrib["points"].split()):
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height


def test_undoing_shows_each_op_with_its_controls_and_the_ceiling(tmp_path: Path) -> None:
    def scores(told: float) -> dict[str, Any]:
        return {
            "with_action": _score(told),
            "without_action": _score(0.111),
            "shuffled": _score(0.022),
            "restored": _score(0.4),
        }

    strengths = [{"strength": "σ 0.5 px", **scores(0.2)}, {"strength": "σ 2.0 px", **scores(0.345)}]
    result = {
        "protocol": "corruptions",
        "chance": 0.0239,
        "images": 5,
        "bank": 256,
        "queries": 16,
        "distance": "pooled",
        "context": "teacher",
        "conditioning": "feature",
        "clean": scores(0.555),
        "ops": [{"op": "blur", "trained": True, **scores(0.2725), "strengths": strengths}],
        "figures": [],
    }
    html = corruption_section(_run(tmp_path, undo=with_tables(result)))
    for words in ("upper bound", "0.555", "0.273", "0.345", "0.111", "0.022", "σ 2.0 px", "chance 0.0239"):
        assert words in html
    assert "by construction" not in html


def test_sweeps_that_do_not_follow_the_action_are_named(tmp_path: Path) -> None:
    grids = _grids()
    hue = grids["series"][0]
    at_chance = {**hue["with_action"], "hits": _score(0.07), "correlation": _score(0.04)}
    control = {**hue["control"], "hits": _score(0.05)}
    grids["conditioning"] = "feature"
    grids["series"] = [
        {**hue, "trained": True},
        {**hue, "name": "contrast", "op": "contrast", "trained": True, "with_action": at_chance, "control": control},
        # All views retrieved are the clean image, as they should be: no correlation, but exact.
        {**hue, "name": "undo blur", "op": "blur", "undo": True, "trained": True, "control": control}
        | {"with_action": {**hue["with_action"], "correlation": _score(0.0)}},
        {**hue, "name": "saturation", "op": "saturation"},
    ]
    html = sweep_section(_run(tmp_path, grids=grids))
    assert "Like the control: contrast. " in html
    assert "Never trained: saturation. " in html
    assert "<b>exact 0.41</b>" in html
    assert "Like the control" not in sweep_section(_run(tmp_path, grids=_grids()))


def test_photographs_for_which_retrieval_fails_are_named(tmp_path: Path) -> None:
    photographs = [
        {"key": key, "actions": [{"action": "hue +9°", "rank": float(rank)} for rank in ranks]}
        for key, ranks in (("found", (1, 200)), ("lost", (90, 200)))
    ]
    result = {"protocol": "retrieval", "chance": 0.024, "photographs": photographs, "figures": []}
    html = retrieval_picture(_run(tmp_path, retrieval=result))
    assert "Retrieval fails for lost (ranks 90, 200)" in html
    assert "found" not in html


def actions_in_a_row(two_passes: float, conditioning: str = "feature") -> dict[str, Any]:
    """A result of `composition` whose two passes have this MRR."""

    def row(mrr: float, distance: float) -> dict[str, Any]:
        return {
            "mrr": dict.fromkeys(DISTANCES, _score(mrr)),
            "relative_distance": dict.fromkeys(DISTANCES, _score(distance)),
        }

    composition = dict.fromkeys(COMPOSITION, row(0.612, 0.8)) | {"two_passes": row(two_passes, 1.057)}
    return with_tables(
        {
            "protocol": "composition",
            "chance": 0.0741,
            "chance_source": 0.0732,
            "images": 5,
            "bank": 64,
            "queries": 12,
            "context": "teacher",
            "conditioning": conditioning,
            "trained": True,
            "composition": composition | {"other_action": row(0.07, 1.9)},
            "undoing": dict.fromkeys(UNDOING, row(0.41, 1.0)) | {"other_action": row(0.069, 1.6)},
            "chain": {"1": row(0.612, 0.8), "2": row(0.51, 0.95), "3": row(0.4, 1.234)},
        }
    )


def test_actions_in_a_row_have_their_controls_and_charts_over_the_passes(tmp_path: Path) -> None:
    html = composition_section(_run(tmp_path, row=actions_in_a_row(0.447)))
    assert html.startswith("<section><h2>Actions in a row</h2>")
    for words in ("two passes: a, then b", "0.447±0.020", "control: a, then another pair", "chance 0.0741", "3 passes"):
        assert words in html
    drawings = [svg for svg in html.split("<svg")[1:] if 'viewBox="0 0 360' in svg]
    assert len(drawings) == 2
    assert "chance 0.07" in drawings[0]
    assert "doing nothing 1" in drawings[1]
    assert "Like the control" not in html


def test_actions_in_a_row_that_are_like_the_control_are_named(tmp_path: Path) -> None:
    html = composition_section(_run(tmp_path, row=actions_in_a_row(0.1)))
    assert "Like the control: two actions in a row. " in html
    html = composition_section(_run(tmp_path, row=actions_in_a_row(0.1, "none")))
    assert "Like the control" not in html
    assert "by construction" in html


def test_inferred_actions_show_their_scores_the_ideal_and_the_control(tmp_path: Path) -> None:
    html = inferred_actions(_run(tmp_path, inferred=with_tables(inferred_actions_result())))
    for words in (
        "Sampled source: hue",
        "correlation 0.87",
        "degrees",
        "ideal",
        "40±2",
        "Chance: 50",
        "actions were shuffled",
    ):
        assert words in html
    assert html.count("polygon") == 2  # of the search and of the control; there is no regressor


def test_what_was_not_run_has_no_section(tmp_path: Path) -> None:
    empty = _run(tmp_path)
    for section in (sweep_section, corruption_section, composition_section, inferred_actions):
        assert section(empty) == ""

"""Figures 3 and 4 of several runs: a point per model beside the paper's, with their correlation and as a table."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dali_pipelines.views import SCENARIOS
from iwm.config_io import to_yaml
from iwm.recipes import RECIPES
from iwm.report.efficiency import paper_points as finetuned_by_the_paper
from iwm.report.equivariance import ACCURACIES, EquivariancePoint, correlations, own_mrr, paper_points
from iwm.report.page import write_page
from iwm.report.runs import read_run
from tests.downstream.written_results import predictor, result, run, trial
from tests.report.conftest import with_tables
from tests.report.test_compared_runs import _scores as scores


def _mrr(mean: float, scenario: str | None = None, jitter_impl: str | None = None) -> dict[str, Any]:
    found = {"mrr": scores(mean), "shuffled_actions": scores(0.02), "recall": {"at_1": scores(0), "at_5": scores(0)}}
    settings = {"bank": {"scenario": scenario}, "jitter_impl": jitter_impl}
    about = {"protocol": "mrr", "checkpoint": "x.pt", "images": 64, "bank": 256, "chance": 0.0239, "settings": settings}
    return with_tables({**about, **found, "versions": {}})


def _model(folder: Path, depth: int, seed: int, mrr: float, linear: float, tuned: float, millions: float) -> Path:
    config = RECIPES["iwm_b16_equi_18x384"]()
    config = replace(
        config,
        predictor=replace(config.predictor, depth=depth),
        train=replace(config.train, seed=seed),
    )
    pretrained = {**predictor("pretrained", tuned), "parameters": int(1e6 * millions)}
    return run(
        folder,
        to_yaml(config),
        mrr=_mrr(mrr),
        linear=result("linear", trial(linear)),
        tuned=result("finetune-predictor", pretrained, predictor("random", 0.99)),
        encoder=result("finetune-encoder", {**trial(0.7), "parameters": 86_400_000}),
    )


@pytest.fixture
def page(tmp_path: Path) -> str:
    """Three models, one of two seeds."""
    folders = [
        _model(tmp_path / "six-s0", 6, 0, 0.1, 0.60, 0.70, 14.0),
        _model(tmp_path / "six-s1", 6, 1, 0.2, 0.58, 0.71, 14.0),
        _model(tmp_path / "twelve", 12, 0, 0.5, 0.50, 0.75, 25.0),
        _model(tmp_path / "eighteen", 18, 0, 0.8, 0.40, 0.80, 36.0),
    ]
    return write_page(folders, tmp_path / "page.html").read_text()


def _section(page: str, anchor: str) -> str:
    [found] = re.findall(rf'<section id="{anchor}">.*?</section>', page, re.S)
    return unescape(found)


def _readings(section: str) -> list[dict[str, dict[str, list[Any]]]]:
    charts = re.findall(r"<svg[^>]*data-readings='(.*?)'", section, re.S)
    return [{line["name"]: line["points"] for line in json.loads(chart)} for chart in charts]


def test_the_papers_correlations_are_those_of_its_twelve_models() -> None:
    found = correlations(paper_points(), list(ACCURACIES))
    assert {name: round(value or 0, 2) for name, value in found.items()} == {
        "linear": -0.61, "attentive": -0.52, "finetune-predictor": 0.86,
    }  # fmt: skip


def test_a_correlation_needs_three_models_that_differ() -> None:
    points = [EquivariancePoint(str(i), i / 10, {"linear": 50.0 - i, "attentive": 60.0}) for i in range(4)]
    assert correlations(points, ["linear", "attentive", "segmentation"]) == {
        "linear": pytest.approx(-1.0),
        "attentive": None,
    }
    assert correlations(points[:2], ["linear"]) == {"linear": None}


def test_figure_4_has_a_point_per_model_at_the_mean_of_its_seeds_beside_the_papers(page: str) -> None:
    section = _section(page, "mrr-and-accuracy-figure-4")
    linear, tuned = _readings(section)
    assert [point[2:] for point in linear["ours"]] == [
        ["0.15", "59 (six (2 seeds))"], ["0.5", "50 (twelve)"], ["0.8", "40 (eighteen)"],
    ]  # fmt: skip
    assert [point[3] for point in tuned["ours"]] == ["70.5 (six (2 seeds))", "75 (twelve)", "80 (eighteen)"]
    assert len(linear["paper"]) == len(tuned["paper"]) == 12
    assert "Pearson's r with" in re.sub("<[^>]*>", "", section)
    assert re.search(r"ours -1\.00 \(3 models\), paper -0\.61 \(12 models\)", section)
    assert "Attentive" not in section
    assert re.search(r'"row">paper: 18 blocks, strong</th><td>0.850</td><td>34.3</td><td>81.7</td>', section)


def test_figure_3_has_predictors_of_several_sizes_beside_the_papers(page: str) -> None:
    [chart] = _readings(_section(page, "trained-parameters-and-accuracy-figure-3"))
    assert [point[2] for point in chart["ours: pretrained predictor"]] == ["14", "14", "25", "36"]
    assert [point[2] for point in chart["ours: encoder"]] == ["86.4"] * 4
    assert chart["paper: pretrained predictor"][-1][2:] == ["36.1", "83.3 (IWM-Equi 18×384, 300 epochs)"]
    assert "ViT-L" not in str(chart)


def test_the_papers_121_million_parameters_are_counted_and_its_307_but_for_one_percent() -> None:
    points = {(point.name, point.part): point.millions for point in finetuned_by_the_paper(large=True)}
    assert points["IWM-Equi 18×384, 300 epochs", "end to end"] == pytest.approx(121, abs=1)
    assert points["ViT-L/16 IWM-Equi 36×512, 300 epochs", "encoder"] == pytest.approx(307, rel=0.01)
    assert not [name for name, part in points if name.startswith("DINO") and part != "encoder"]


def test_points_are_drawn_without_a_line_and_all_of_them(page: str) -> None:
    section = _section(page, "mrr-and-accuracy-figure-4")
    chart = ElementTree.fromstring(re.findall(r"<svg viewBox=\"0 0 360.*?</svg>", section, re.S)[0])
    assert not chart.findall("polyline")
    assert len(chart.findall("path")) == 3 + 12
    assert chart.attrib["aria-label"] == "ours, paper; top-1 accuracy, % over MRR, 0 to 1"


def test_the_bank_is_that_of_the_runs_own_jitter(tmp_path: Path) -> None:
    base = RECIPES["iwm_b16_equi_18x384"]()
    strong = replace(base, views=replace(base.views, target=SCENARIOS["strong"].target))
    files = {"mrr-default": _mrr(0.1, "default"), "mrr-strong": _mrr(0.7, "strong")}
    assert own_mrr(read_run(run(tmp_path / "strong", to_yaml(strong), **files))) == 0.7
    assert own_mrr(read_run(run(tmp_path / "default", to_yaml(base), **files))) == 0.1
    del files["mrr-default"]
    assert own_mrr(read_run(run(tmp_path / "other", to_yaml(base), **files))) is None
    other = {"mrr-default-torchvision": _mrr(0.3, "default", "torchvision")}
    assert own_mrr(read_run(run(tmp_path / "kind", to_yaml(base), **other))) is None


def test_one_run_and_runs_without_results_have_no_such_figures(tmp_path: Path) -> None:
    alone = _model(tmp_path / "alone", 18, 0, 0.8, 0.4, 0.8, 36.0)
    assert "figure-4" not in write_page([alone], tmp_path / "one.html").read_text()
    runs = [run(tmp_path / name, mrr=_mrr(0.5)) for name in ("a", "b")]
    page = write_page(runs, tmp_path / "two.html").read_text()
    assert "figure-4" not in page
    assert "figure-3" not in page

"""A study's tables say mean and range over seeds, the paper's figure beside ours, and where nothing was run."""

from __future__ import annotations

from typing import Any

import pytest

from iwm.ablation.studies import STUDIES, AblationStudy, Variant
from iwm.ablation.tables import tables
from iwm.evaluation.result_table import ResultTable
from iwm.recipes import RECIPES
from iwm.report.components import html_table
from tests.evaluation.printed import assert_whole

STUDY = AblationStudy(
    "Table 1",
    (
        Variant("default", "none", (), paper=0.0),
        Variant("default", "feature", ("x",), paper=0.79),
        Variant("strong", "feature", ("y",), bank="strong"),
    ),
)


def _result(row: str, column: str, bank: str, seed: int, own: float, common: float) -> dict[str, Any]:
    def mrr(value: float) -> dict[str, Any]:
        scores = {"pooled": {"teacher": {"mean": value}}, "per_token": {"teacher": {"mean": value / 2}}}
        shuffled = {name: {"teacher": {"mean": 0.02}} for name in scores}
        return {"images": 64, "bank": 256, "chance": 0.0239, "mrr": scores, "shuffled_actions": shuffled}

    similarity = {"images": 128, "augmentations": 16, "variance_ratio": {"mean": 0.1 + seed}}
    evaluations = {f"mrr-{bank}": mrr(own), "mrr-default": mrr(common), "similarity": similarity}
    return {"row": row, "column": column, "bank": bank, "seed": seed, "evaluations": evaluations}


FOUND = [
    _result("default", "feature", "default", 0, 0.2, 0.2),
    _result("default", "feature", "default", 1, 0.3, 0.3),
    _result("strong", "feature", "strong", 0, 0.5, 0.1),
]


def _rows(table: ResultTable) -> dict[str, list[str]]:
    return {name: cells for name, *cells in table.rows}


def test_places_have_mean_and_range_the_papers_figure_or_say_not_run() -> None:
    own, common, per_token, shuffled, ratio = tables(STUDY, FOUND, "default")
    assert own.columns == ["", "none", "feature"]
    assert _rows(own)["default"] == ["not run, paper 0.00", "0.250 (0.200–0.300), paper 0.79"]
    assert _rows(own)["strong"] == ["", "0.500"]
    assert _rows(common)["strong"] == ["", "0.100"]
    assert _rows(per_token)["default"][1] == "0.125 (0.100–0.150)"
    assert _rows(shuffled)["default"][1] == "0.020 (0.020–0.020)"
    assert _rows(ratio)["default"][1] == "0.600 (0.100–1.100)"


def test_the_caption_says_what_was_asked_and_whose_figures_stand_beside() -> None:
    own, common, *_ = tables(STUDY, FOUND, "default")
    assert "64 held-out images, bank of 256, chance 0.024" in own.caption
    assert "ImageNet, 300 epochs" in own.caption
    assert "seeds 0, 1" in common.caption
    assert "paper" not in common.markdown()
    trained_on = _result("default", "feature", "default", 0, 0.2, 0.2)
    trained_on["evaluations"]["mrr-default"]["data"] = {"held_out": False}
    assert "64 training images" in tables(STUDY, [trained_on], "default")[0].caption


def test_nothing_run_gives_no_table() -> None:
    assert tables(STUDY, [], "default") == []


def test_markdown_is_a_table_of_as_many_columns() -> None:
    lines = tables(STUDY, FOUND, "default")[0].markdown().splitlines()
    assert {line.count("|") for line in lines[2:]} == {4}


def test_the_page_gets_the_same_table_with_its_words_escaped() -> None:
    trial = Variant("a < b", "none", (), paper=0.5)
    found = [_result("a < b", "none", "default", 0, 0.25, 0.25)]
    page = html_table(tables(AblationStudy("One", (trial,)), found, "default")[0])
    assert '<th scope="row">a &lt; b</th><td>0.250, paper 0.50</td>' in page


@pytest.mark.parametrize("name", STUDIES)
def test_grids_of_every_study_are_whole_in_a_terminal_of_80_columns(name: str) -> None:
    study = STUDIES[name](RECIPES["iwm_b16_equi_18x384"]())
    found = [
        _result(variant.row, variant.column, variant.bank_name, seed, 0.2 + seed / 10, 0.1)
        for variant in study.variants
        for seed in (0, 1)
    ]
    for table in tables(study, found, "default"):
        assert_whole(table)

"""A study's tables say mean and range over seeds, the paper's figure beside ours, and where nothing was run."""

from __future__ import annotations

from typing import Any

from iwm.ablation.studies import Arm, Study
from iwm.ablation.tables import tables

STUDY = Study(
    "Table 1",
    (
        Arm("default", "none", (), paper=0.0),
        Arm("default", "feature", ("x",), paper=0.79),
        Arm("strong", "feature", ("y",), bank="strong"),
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


def test_places_have_mean_and_range_the_papers_figure_or_say_not_run() -> None:
    own, common, per_token, shuffled, ratio = tables(STUDY, FOUND, "default")
    assert own.columns == ["none", "feature"]
    assert own.rows["default"] == ["not run, paper 0.00", "0.250 (0.200–0.300), paper 0.79"]
    assert own.rows["strong"] == ["", "0.500"]
    assert common.rows["strong"] == ["", "0.100"]
    assert per_token.rows["default"][1] == "0.125 (0.100–0.150)"
    assert shuffled.rows["default"][1] == "0.020 (0.020–0.020)"
    assert ratio.rows["default"][1] == "0.600 (0.100–1.100)"


def test_the_caption_says_what_was_asked_and_whose_figures_stand_beside() -> None:
    own, common, *_ = tables(STUDY, FOUND, "default")
    assert "64 images, bank of 256, chance 0.024" in own.caption
    assert "ImageNet, 300 epochs" in own.caption
    assert "seeds 0, 1" in common.caption
    assert "paper" not in common.markdown()


def test_nothing_run_gives_no_table() -> None:
    assert tables(STUDY, [], "default") == []


def test_markdown_is_a_table_of_as_many_columns() -> None:
    lines = tables(STUDY, FOUND, "default")[0].markdown().splitlines()
    assert {line.count("|") for line in lines[2:]} == {4}


def test_the_page_gets_the_same_table_with_its_words_escaped() -> None:
    arm = Arm("a < b", "none", (), paper=0.5)
    page = tables(Study("One", (arm,)), [_result("a < b", "none", "default", 0, 0.25, 0.25)], "default")[0].html()
    assert "<td>a &lt; b</td><td>0.250, paper 0.50</td>" in page

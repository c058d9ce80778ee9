"""One page for several runs: a line per arm, a row per run, the fields that differ and only those."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from iwm.config import Config
from iwm.config_io import to_yaml
from iwm.recipes import demo
from iwm.report.__main__ import main
from iwm.report.components import ChartLine, line_chart
from iwm.report.page import write_page, write_report
from iwm.report.runs import ReportError, differing_fields, group_by_seed, read_runs
from iwm.report.training import mean
from shards.errors import UserError
from tests.report.conftest import with_tables


def _make(folder: Path, config: Config, mrr: float, torch: str = "2") -> Path:
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = [{"step": step, "loss": 1 / step, "images_per_second": 500.0} for step in range(50, 550, 50)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"protocol": "mrr", "checkpoint": "x.pt", "images": 64, "bank": 256, "chance": 0.0239}
    scores = {
        "mrr": _scores(mrr),
        "shuffled_actions": _scores(0.02),
        "recall": {"at_1": _scores(0), "at_5": _scores(0)},
    }
    (folder / "eval" / "mrr.json").write_text(
        json.dumps(with_tables({**result, **scores, "versions": {"torch": torch}}))
    )
    return folder


def _scores(value: float) -> dict[str, Any]:
    score = {"mean": value, "standard_error": 0.0125}
    return {distance: dict.fromkeys(("teacher", "student"), score) for distance in ("pooled", "per_token")}


def _with(conditioning: Any, seed: int) -> Config:
    base = demo()
    return replace(base, action=replace(base.action, conditioning=conditioning), train=replace(base.train, seed=seed))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two arms of two seeds."""
    return [
        _make(tmp_path / f"{conditioning}-s{seed}", _with(conditioning, seed), 0.1 * (i + 1) + 0.01 * seed)
        for i, conditioning in enumerate(("sequence", "feature"))
        for seed in (0, 1)
    ]


def test_arms_are_runs_that_differ_in_nothing_but_their_seed(folders: list[Path]) -> None:
    found = group_by_seed(read_runs(folders))
    assert [trial.name for trial in found] == ["sequence (2 seeds)", "feature (2 seeds)"]
    assert [[run.name for run in trial.runs] for trial in found] == [
        ["sequence-s0", "sequence-s1"],
        ["feature-s0", "feature-s1"],
    ]


def test_runs_of_one_configuration_and_seed_are_not_taken_for_seeds(tmp_path: Path) -> None:
    same = [_make(tmp_path / name, _with("feature", 0), 0.1) for name in ("before", "after")]
    assert [trial.name for trial in group_by_seed(read_runs(same))] == ["before", "after"]


def test_only_fields_that_differ_are_compared(folders: list[Path]) -> None:
    assert differing_fields(read_runs(folders)) == {
        "action.conditioning": ["sequence", "sequence", "feature", "feature"],
        "train.seed": [0, 1, 0, 1],
    }


def test_the_page_has_a_row_per_run_a_line_per_arm_and_what_differs(folders: list[Path], tmp_path: Path) -> None:
    page = write_page(folders, tmp_path / "page.html").read_text()
    headline = page[: page.index('<section id="mean-reciprocal-rank">')]
    for name, score in (("sequence-s0", "0.100"), ("sequence-s1", "0.110"), ("feature-s1", "0.210")):
        assert re.search(rf"{name}</th><td[^>]*><b>{score}</b>", headline)
    loss = page[page.index("<h3><span>Loss") :]
    assert loss[: loss.index("</svg>")].count("<polyline") == 2
    table = page[page.index("Differing fields") :]
    table = table[: table.index("</table>")]
    assert "action.conditioning" in table
    assert "optim.lr" not in table
    assert "http" not in page
    assert page.count("<script") == 1


def test_a_study_has_a_point_per_seed_and_names_the_best_arm(folders: list[Path], tmp_path: Path) -> None:
    page = write_page(folders, tmp_path / "page.html").read_text()
    section = page[page.index('<section id="comparison">') : page.index('<section id="mean-reciprocal-rank">')]
    text = re.sub("<[^>]*>", "", section)
    assert "Highest MRR: feature (2 seeds), mean 0.205 (0.200 to 0.210), chance 0.024" in text
    assert "all of its runs lie above those of the next, sequence (2 seeds), mean 0.105 (0.100 to 0.110)" in text
    titles = re.findall(r"<h3><span>(.*?)</span>", section)
    assert [re.sub("<[^>]*>", "", title) for title in titles] == [
        "MRR, pooled",
        "MRR, per token",
        "MRR with shuffled actions",
        "Last loss",
    ]
    for svg in re.findall(r"<svg viewBox.*?</svg>", section, re.S):
        assert len(ElementTree.fromstring(svg).findall("path")) == 4


def test_runs_are_linked_relative_to_the_page_where_they_have_one(folders: list[Path], tmp_path: Path) -> None:
    write_report(folders[0])
    page = write_page(folders, tmp_path / "elsewhere.html").read_text()
    assert re.findall(r'<th scope="row"><a href="([^"]*)"', page) == ["sequence-s0/report.html"]
    (tmp_path / "below").mkdir()
    page = write_page(folders, tmp_path / "below" / "page.html").read_text()
    assert re.findall(r'<th scope="row"><a href="([^"]*)"', page) == ["../sequence-s0/report.html"]


def test_versions_that_differ_are_named(tmp_path: Path) -> None:
    runs = [_make(tmp_path / name, _with("feature", 0), 0.1, torch) for name, torch in (("old", "2.1"), ("new", "2.2"))]
    page = write_page(runs, tmp_path / "page.html").read_text()
    assert re.search(r"version of torch</th><td>2.1</td><td>2.2</td>", page)


def test_runs_that_lack_something_are_compared_all_the_same(folders: list[Path], tmp_path: Path) -> None:
    (folders[0] / "eval" / "mrr.json").unlink()
    (folders[1] / "metrics.jsonl").unlink()
    (folders[2] / "config.yaml").unlink()
    page = write_page(folders, tmp_path / "page.html").read_text()
    assert all(folder.name in page for folder in folders)
    empty = [tmp_path / name for name in ("a", "b")]
    for folder in empty:
        folder.mkdir()
    assert "2 runs" in write_page(empty, tmp_path / "empty.html").read_text()


def test_names_that_are_the_same_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = read_runs([_make(tmp_path / day / "demo", demo(), 0.1) for day in ("monday", "tuesday")])
    assert [run.name for run in runs] == ["monday/demo", "tuesday/demo"]


def test_a_run_given_twice_and_a_broken_configuration_are_refused(folders: list[Path]) -> None:
    with pytest.raises(ReportError, match=r"given twice"):
        read_runs([folders[0], folders[0] / ".." / folders[0].name])
    (folders[1] / "config.yaml").write_text("optim:\n  speed: 3\n")
    with pytest.raises(ReportError, match=r"sequence-s1.config.yaml.*speed"):
        differing_fields(read_runs(folders))


def test_the_command_writes_beside_the_runs_or_where_it_is_told(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["iwm.report", *map(str, folders)])
    main()
    assert "4 runs" in (folders[0].parent / "comparison.html").read_text()
    monkeypatch.setattr(sys, "argv", ["iwm.report", str(folders[0]), "--out", str(tmp_path / "one.html")])
    main()
    assert folders[0].name in (tmp_path / "one.html").read_text()
    monkeypatch.setattr(sys, "argv", ["iwm.report"])
    with pytest.raises(UserError, match="no run is given"):
        main()


def test_the_mean_of_curves_is_over_the_steps_that_all_have() -> None:
    assert mean([[(1, 1.0), (2, 2.0), (3, 9.0)], [(1, 3.0), (2, 6.0)]]) == [(1, 2.0), (2, 4.0)]


def test_many_lines_can_be_told_apart() -> None:
    lines = [ChartLine(f"arm {i}", [(0, float(i)), (1, i + 1.0), (2, i + 2.0)]) for i in range(18)]
    root = ElementTree.fromstring(line_chart(lines))
    assert len({line.attrib["class"] for line in root.findall("polyline")}) == 18


def test_a_line_without_points_keeps_its_place_in_the_order_of_colours() -> None:
    root = ElementTree.fromstring(line_chart([ChartLine("a", []), ChartLine("b", [(0, 1.0), (1, 2.0), (2, 1.5)])]))
    assert [line.attrib["class"] for line in root.findall("polyline")] == ["line s2 d1"]

"""The page says which images a result is from, and what was left out, from the run's files alone."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from iwm.report.__main__ import main
from iwm.report.evaluator_sections import nearest_neighbours
from iwm.report.page import write_page, write_report
from iwm.report.runs import read_run
from tests.report.conftest import with_tables

NOTE = "photos has no split 'val': evaluated on split 'train', on which the model was trained"


def _text(page: str) -> str:
    return re.sub("<[^>]*>", "", page)


def _run(folder: Path, mrr: float, *, held_out: bool) -> Path:
    """Write a run with results of `mrr` and `knn`, and a world-model that left `knn` out."""
    (folder / "eval").mkdir(parents=True)
    data: dict[str, Any] = {"shards": "photos", "split": "val", "held_out": True}
    if not held_out:
        data = {"shards": "photos", "split": "train", "held_out": False, "note": NOTE}
    score = {"mean": mrr, "standard_error": 0.01}
    scores = {distance: dict.fromkeys(("teacher", "student"), score) for distance in ("pooled", "per_token")}
    origin = {"checkpoint": "elsewhere/step-000000007.pt", "data": data}
    figures = {"images": 12, "bank": 256, "chance": 0.024, "mrr": scores, "shuffled_actions": scores}
    recall = {"at_1": scores, "at_5": scores}
    notes = ["12 of at most 64 images: split 'x' has no more"]
    accuracy = {"teacher": {"10": score}, "student": {"10": score}}
    old = {"checkpoint": "elsewhere/step-000000003.pt"}
    labels = {"label": "label", "classes": 2, "train_images": 9, "val_images": 3, "chance": 0.5, "accuracy": accuracy}
    left_out = {"knn": "split 'train' has no labels"}
    for result in (
        with_tables({"protocol": "mrr", **origin, **figures, "recall": recall, "notes": notes}),
        with_tables({"protocol": "knn", **old, **labels}),
        {"protocol": "world-model", **origin, "left_out": left_out, "tables": []},
    ):
        (folder / "eval" / f"{result['protocol']}.json").write_text(json.dumps(result))
    return folder


def test_a_copied_run_gives_the_same_page_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path / "a" / "run", 0.3, held_out=False)
    page = write_report(run).read_text()
    shutil.copytree(run, tmp_path / "b" / "run")
    monkeypatch.setattr(sys, "argv", ["iwm.report", str(tmp_path / "b" / "run")])
    main()
    assert (tmp_path / "b" / "run" / "report.html").read_text() == page
    assert page.count("has no labels") == 1
    assert "12 of at most 64 images" in page
    assert page.count('class="warning"') == 1
    assert "± 0.010, training images" in page


def test_a_result_that_was_there_before_it_was_left_out_has_its_own_checkpoint(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 0.3, held_out=True)
    section = nearest_neighbours(read_run(run))
    assert (
        "Earlier result: the last world-model left this evaluator out: split &#39;train&#39; has no labels. step-"
        in section
    )
    (run / "eval" / "world-model.json").unlink()
    assert "Earlier result" not in nearest_neighbours(read_run(run))
    assert "Left out" not in write_report(run).read_text()


def test_the_reason_of_what_was_left_out_stands_where_its_section_would(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 0.3, held_out=True)
    (run / "eval" / "knn.json").unlink()
    page = write_report(run).read_text()
    [section] = re.findall(r'<section id="nearest-neighbours">.*?</section>', page, re.S)
    assert "Left out: split &#39;train&#39; has no labels." in section
    assert "Not evaluated: retrieval, parameter-sweep," in page


def test_a_comparison_names_the_runs_that_were_measured_on_training_images(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name, 0.3, held_out=held_out) for name, held_out in (("one", True), ("two", False))]
    page = write_page(runs, tmp_path / "page.html").read_text()
    assert "two: photos has no split" in page
    assert "one: photos has no split" not in page
    assert "<td>12 held-out images</td>" in page
    assert "<td>12 training images</td>" in page


def test_results_of_older_versions_count_as_held_out(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 0.3, held_out=True)
    result = json.loads((run / "eval" / "mrr.json").read_bytes())
    del result["data"], result["notes"]
    (run / "eval" / "mrr.json").write_text(json.dumps(result))
    page = write_report(run).read_text()
    assert 'class="warning"' not in page
    assert "± 0.010, held-out images" in _text(page)

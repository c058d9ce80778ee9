"""The page shows what was trained on the encoder and the world model: arms, seeds, chance, and how they came about."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from iwm.report.components import ChartMark, mark_chart
from iwm.report.page import write_page, write_report
from iwm.report.runs import ReportError
from tests.downstream.written_results import predictor, result, run, trial


def _metrics(folder: Path, name: str, **curves: list[float]) -> None:
    (folder / "eval" / name).mkdir()
    lines = [
        {"step": 150 * (place + 1), "loss": 1.0, **{field: values[place] for field, values in curves.items()}}
        for place in range(len(next(iter(curves.values()))))
    ]
    (folder / "eval" / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _section(page: str) -> str:
    [found] = re.findall(r'<section id="downstream-tasks">.*?</section>', page, re.S)
    return found


def _charts(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg viewBox=\"0 0 360.*?</svg>", html, re.S)]


def test_every_arm_has_a_row_with_its_score_best_epoch_parameters_and_speed(tmp_path: Path) -> None:
    probes = {"trials": {"teacher, lr 1": trial(0.525), "teacher, lr 2": {**trial(0.4), "skipped_steps": 7}}}
    folder = run(tmp_path / "x", linear=result("linear") | probes)
    page = _section(write_report(folder).read_text())
    assert re.search(
        r'lr 1</th><td class="bar" style="--share:1.000"><b>52.5</b> ± 1.0</td><td>57.5 at 3</td><td>100</td>'
        r"<td>1,234</td>",
        page,
    )
    assert re.search(r"lr 2<small>7 <a [^>]*>non-finite steps skipped</a></small></th>.*?<b>40.0</b>", page)
    assert "chance (majority class) 10.0 %" in page
    assert not _charts(page)


def test_pretrained_and_random_predictors_are_compared_over_seeds(tmp_path: Path) -> None:
    trials = [predictor("random", mean, seed) for seed, mean in enumerate((0.50, 0.52, 0.54))]
    trials += [predictor("pretrained", mean, seed) for seed, mean in enumerate((0.55, 0.56, 0.57))]
    encoder = {**trial(0.7), "parameters": 1_000_000}
    folder = run(tmp_path / "x", p=result("finetune-predictor", *trials), e=result("finetune-encoder", encoder))
    page = _section(write_report(folder).read_text())
    assert "pretrained over random predictor: +4.0 ± 1.0 points, mean ± standard deviation over 3 seeds" in page
    assert re.search(r'"row">pretrained predictor</th><td>56.0 ± 1.0, 3 seeds</td><td>10.0</td><td>100</td>', page)
    assert re.search(r'"row">encoder</th><td>70.0 ± 1.0</td><td>10.0</td><td>1,000,000</td>', page)
    [chart] = _charts(page)
    assert {"encoder", "random predictor", "pretrained predictor"} <= {text.text for text in chart.iter("text")}


def test_curves_are_those_of_the_training_with_seeds_as_one_band(tmp_path: Path) -> None:
    trials = {
        "pretrained, seed 0": predictor("pretrained", 0.6, 0),
        "pretrained, seed 1": predictor("pretrained", 0.7, 1),
        "random, seed 0": predictor("random", 0.5, 0),
        "random, seed 1": predictor("random", 0.5, 1),
    }
    folder = run(tmp_path / "x", p=result("finetune-predictor", training="p") | {"trials": trials})
    curves = {f"top1/{name}": [0.3, 0.5, 0.5 + place / 10] for place, name in enumerate(trials)}
    _metrics(folder, "p", top1=[0.3, 0.5, 0.7], **curves)
    page = _section(write_report(folder).read_text())
    _, chart = _charts(page)
    assert chart.attrib["aria-label"] == "pretrained, random; accuracy, % over epoch"
    assert len(chart.findall("polyline")) == len(chart.findall("polygon")) == 2
    texts = {text.text for text in chart.iter("text")}
    assert {"40", "60", "80", "chance 10"} <= texts  # 450 steps are 90 epochs
    assert "mean and standard deviation over seeds" in page


def test_tasks_of_one_predictor_have_a_column_each(tmp_path: Path) -> None:
    task = {"shards": "/data/boxes", "classes": 3, "train_images": 50, "val_images": 20, "chance": 0.4}
    scores = {name: {"top1": {"mean": mean, "standard_error": 0.01}} for name, mean in (("hue", 0.6), ("side", 0.9))}
    trials: dict[str, Any] = {"multitask": {"lr": 1.0, "seed": 0, "scores": scores}}
    trials["single-side"] = {"lr": 1.0, "seed": 0, "scores": {"side": scores["side"]}}
    tasks = {"hue": {**task, "label": "hue"}, "side": {**task, "label": "side"}}
    page = _section(
        write_report(run(tmp_path / "x", m=result("multitask", tasks=tasks) | {"trials": trials})).read_text()
    )
    assert re.search(r"<th scope=\"col\">hue, top-1 %</th><th scope=\"col\">side, top-1 %</th>", page)
    assert re.search(r"multitask</th><td [^>]*><b>60.0</b> ± 1.0</td><td [^>]*><b>90.0</b>", page)
    assert re.search(r"single-side</th><td>no score</td><td [^>]*><b>90.0</b>", page)


def test_segmentation_has_miou_and_no_chance(tmp_path: Path) -> None:
    trials = {"encoder": {"lr": 1e-5, "seed": 0, "part": "encoder", "miou": {"mean": 0.31}, "per_class": [0.3, None]}}
    made = result("segmentation", label="masks", chance=None, training="s") | {"trials": trials}
    folder = run(tmp_path / "x", segmentation=made)
    _metrics(folder, "s", miou=[0.1, 0.31])
    page = _section(write_report(folder).read_text())
    assert "mIoU %" in page
    assert re.search(r"<td [^>]*>31.0</td>", page)
    assert "majority class" not in page
    assert "imagenet masks" not in page
    [chart] = _charts(page)
    # Two values are points with their values: a line would suggest a course.
    assert not chart.findall("polyline")
    assert {"10", "31"} <= {text.text for text in chart.findall("text[@class='label']")}


def test_a_comparison_has_the_papers_tables_with_a_row_for_each_run(tmp_path: Path) -> None:
    folders = [run(tmp_path / name, linear=result("linear", trial(mean))) for name, mean in (("a", 0.4), ("b", 0.6))]
    page = write_page(folders, tmp_path / "page.html").read_text()
    table = page[page.index("Table 8: linear and attentive probing") :]
    table = table[: table.index("</table>")]
    assert "paper: MAE, 1,600 epochs" in table
    assert re.search(r"ours: a, [^<]*</th><td>40.0 ± 1.0</td>", table)
    assert re.search(r"ours: b, [^<]*</th><td>60.0 ± 1.0</td>", table)
    assert "10 classes (chance 10.0)" not in table  # what ours are of is folded away behind it
    assert "<p>linear on imagenet: ViT 12×768" in page


def test_without_such_results_nothing_is_said_and_a_broken_one_is_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "x")
    assert "ownstream" not in write_report(folder).read_text()
    (folder / "eval" / "linear.json").write_text(json.dumps({"protocol": "linear", "trials": {}}))
    with pytest.raises(ReportError, match=r"linear\.json is not a complete linear result"):
        write_report(folder)


def test_points_lie_inside_with_names_that_do_not_cover_each_other() -> None:
    marks = [ChartMark("a & b", 1.0, 60.0, 2.0), None, ChartMark("c", 1.0, 60.1), ChartMark("d", 3.0, 60.2, 5.0)]
    root = ElementTree.fromstring(mark_chart(marks))
    width, height = (float(each) for each in root.attrib["viewBox"].split()[2:])
    dots = root.findall("path[@class]")[1::2]
    assert [dot.attrib["class"] for dot in dots] == ["dot s1 d0", "dot s3 d2", "dot s4 d0"]
    for dot in dots:
        x, y = map(float, re.findall(r"M([\d.]+) ([\d.]+)", dot.attrib["d"])[0])
        assert 0 <= x <= width
        assert 0 <= y <= height
    names = [float(text.attrib["y"]) for text in root.findall("text") if text.text in ("a & b", "c", "d")]
    assert all(above - below >= 10 for above, below in pairwise(names))

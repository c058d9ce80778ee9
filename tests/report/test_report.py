"""The report holds what was run and only that, stands alone, and survives what a killed run leaves."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from iwm.report.axes import number
from iwm.report.components import ChartLine, line_chart
from iwm.report.page import write_report
from iwm.report.runs import ReportError, read_run
from tests.report.conftest import with_tables


def _scores(value: float) -> dict[str, Any]:
    score = {"mean": value, "standard_error": 0.0125}
    return {distance: dict.fromkeys(("teacher", "student"), score) for distance in ("pooled", "per_token")}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "night"
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text("data:\n  shards: <my photos>\n")
    lines = [{"step": step, "loss": 1 / step, "gradient_norm": 2.0} for step in range(50, 2000, 50)]
    lines += [
        {"step": 1000, "mrr_pooled": 0.2, "mrr_chance": 0.0741},
        {"step": 2000, "mrr_pooled": 0.3, "mrr_chance": 0.0741, "rankme": None},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {"chance": 0.0239, "images": 64, "bank": 256, "mrr": _scores(0.4321), "shuffled_actions": _scores(0.0211)}
    recall = {"at_1": _scores(0.25), "at_5": _scores(0.5)}
    result = {
        "protocol": "mrr",
        "checkpoint": "runs/night/x.pt",
        **figures,
        "recall": recall,
        "versions": {"torch": "2"},
    }
    (folder / "eval" / "mrr.json").write_text(json.dumps(with_tables(result)))
    return folder


def test_the_page_shows_the_scores_the_curves_and_the_configuration(run: Path) -> None:
    page = write_report(run).read_text()
    assert page.count("0.432") >= 2
    assert "0.021" in page
    assert "Loss" in page
    assert "gradient norm" in page
    assert "&lt;my photos&gt;" in page


def test_the_page_needs_no_network(run: Path) -> None:
    page = write_report(run).read_text()
    assert not re.search(r"(src|href)\s*=\s*\"(?!data:|#)", page)
    assert page.count("<script") == 1
    assert "url(" not in page
    assert "http" not in page


def test_the_page_suits_dark_screens_and_phones(run: Path) -> None:
    page = write_report(run).read_text()
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_what_was_not_run_is_not_on_the_page(run: Path) -> None:
    (run / "eval" / "mrr.json").unlink()
    page = write_report(run).read_text()
    sections = re.findall(r"<h[23]>(.*?)</h", page)
    assert not {"Mean reciprocal rank", "Retrieval"} & set(sections)
    assert not any("RankMe" in title for title in sections)
    assert "Not evaluated: mrr, retrieval, " in page
    (run / "metrics.jsonl").unlink()
    assert "<svg" not in write_report(run).read_text()


def test_a_line_that_a_kill_cut_short_is_left_out(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2050, "lo')
    assert read_run(run).metrics["loss"][-1][0] == 1950
    assert write_report(run).exists()


def test_damage_inside_the_metrics_names_the_line(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = "rubbish"
    (run / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(ReportError, match=r"metrics.jsonl line 4"):
        read_run(run)


def test_steps_that_a_resumed_run_repeats_count_once_with_the_later_value(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 100, "loss": 7.0}\n')
    points = read_run(run).metrics["loss"]
    assert points[1] == (100, 7.0)
    assert [step for step, _ in points] == sorted({step for step, _ in points})


def test_values_that_were_not_finite_and_skipped_steps_are_named(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2050, "skipped": 3}\n')
    text = re.sub("<[^>]*>", "", write_report(run).read_text())
    assert "Skipped steps: 3 of 2,050." in text
    assert "Values that were not finite, and are not drawn: rankme (1 value)." in text


def test_a_broken_evaluation_file_is_named(run: Path) -> None:
    (run / "eval" / "other.json").write_text("{}")
    with pytest.raises(ReportError, match=r"other.json"):
        write_report(run)


def test_the_command_ends_with_one_line_where_there_is_no_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "iwm.report", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"iwm.report: .*nowhere.*\n", done.stderr)


def test_a_chart_is_well_formed_and_its_curve_stays_inside() -> None:
    svg = line_chart([ChartLine("a & b", [(0, 1.0), (500, 3.0), (1000, 2.0)])], ("chance", 0.5))
    root = ElementTree.fromstring(svg)
    width, height = (float(each) for each in root.attrib["viewBox"].split()[2:])
    for x, y in (pair.split(",") for pair in root.find("polyline").attrib["points"].split()):
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height


@pytest.mark.parametrize("points", [[(5, 0.0)], [(1, 2.0), (2, 2.0)], [(1, -1.0), (2, -3.0)], [(1, 1e-9), (2, 2e-9)]])
def test_a_chart_of_any_values_can_be_drawn(points: list[tuple[float, float]]) -> None:
    assert "nan" not in line_chart([ChartLine("x", points)])


def test_a_long_curve_is_thinned_to_means() -> None:
    svg = line_chart([ChartLine("x", [(i, float(i % 2)) for i in range(10_000)])])
    points = ElementTree.fromstring(svg).find("polyline").attrib["points"].split()
    assert len(points) <= 300
    assert len({y for _, y in (point.split(",") for point in points)}) == 1


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0, 0.3514, 12.0, 847.2, 12_400, 2.5e6, 1e-5)] == [
        "0", "0.351", "12", "847.2", "12.4k", "2.5M", "1.0e-05",
    ]  # fmt: skip


def test_every_mrr_of_the_page_is_listed_with_its_bank_and_its_chance(run: Path) -> None:
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', write_report(run).read_text())
    listed = {name: re.findall(r"<td[^>]*>(.*?)</td>", cells) for name, cells in rows}
    assert listed["training, small bank"][:3] == ["0.300", "4.0", "0.074"]
    assert listed["mrr"] == ["0.432", "18.1", "0.024", "256", "64", "pooled, clean image", "night, x.pt"]


def test_the_contents_lead_to_every_section(run: Path) -> None:
    page = write_report(run).read_text()
    sections = re.findall(r'<section id="([^"]+)"', page)
    assert re.findall(r'<a href="#([^"]+)"', page) == sections
    assert len(set(sections)) == len(sections) >= 3


def test_a_result_of_another_version_ends_with_one_line(run: Path) -> None:
    result = json.loads((run / "eval" / "mrr.json").read_bytes())
    del result["tables"]
    (run / "eval" / "mrr.json").write_text(json.dumps(result))
    with pytest.raises(ReportError, match=r"eval: a result lacks 'tables'.*evaluate again or delete it"):
        write_report(run)

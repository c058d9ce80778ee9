"""Charts do not exaggerate, name what they draw, and can be read without colour."""

from __future__ import annotations

import json
import re
from importlib import resources
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from iwm.report.axes import fit_axes
from iwm.report.charts import COLOURS, DASHES, MARKERS, ChartLine, SpreadRow, line_chart, marker, spread_chart, style


def _texts(svg: str) -> list[str | None]:
    return [text.text for text in ElementTree.fromstring(svg).iter("text")]


def test_counts_of_nothing_have_an_axis_from_zero_to_one() -> None:
    assert fit_axes([0, 1], [0.0, 0.0]).y_range == (0.0, 1.0)
    assert fit_axes([0, 1], [3.0, 3.0], from_zero=True).y_range[0] == 0.0


def test_an_axis_from_zero_is_not_cut_and_a_share_reaches_one() -> None:
    assert fit_axes([0, 1], [28.0, 29.0]).y_range[0] > 20
    assert fit_axes([0, 1], [28.0, 29.0], from_zero=True).y_range[0] == 0.0
    assert fit_axes([0, 1], [0.01, 0.02], from_zero=True, top=1.0).y_range == (0.0, 1.0)
    assert fit_axes([0, 1], [0.01, 1.2], from_zero=True, top=1.0).y_range[1] >= 1.2


def test_axes_and_reference_lines_are_named() -> None:
    line = ChartLine("hue", [(-1.0, -0.8), (0.0, 0.1), (1.0, 0.9)])
    svg = line_chart([line], ("chance", 0.5), x_title="true value", y_title="retrieved value", diagonal="ideal")
    assert {"true value", "retrieved value", "ideal", "chance 0.5"} <= set(_texts(svg))
    root = ElementTree.fromstring(svg)
    assert "retrieved value over true value" in root.attrib["aria-label"]
    diagonal, _level = root.findall("line[@class='reference']")
    ends = [float(diagonal.attrib[name]) for name in ("x1", "x2", "y1", "y2")]
    assert ends[0] < ends[1]
    assert ends[2] > ends[3]


def test_two_values_are_points_with_their_values_and_three_are_a_line() -> None:
    few = line_chart([ChartLine("MRR", [(1000, 0.398), (2000, 0.594)])], ("chance", 0.0741))
    assert "<polyline" not in few
    assert {"0.398", "0.594"} <= set(_texts(few))
    assert "<polyline" in line_chart([ChartLine("MRR", [(1, 0.1), (2, 0.2), (3, 0.3)])])


def test_values_are_there_to_be_read_and_names_cannot_leave_their_attribute() -> None:
    svg = line_chart([ChartLine("""it's <b>"x"</b>""", [(50, 1.5), (100, 12_345.6), (150, 3.0)])])
    [line] = json.loads(ElementTree.fromstring(svg).attrib["data-readings"])
    assert line["name"] == """it's <b>"x"</b>"""
    assert [point[2:] for point in line["points"]] == [["50", "1.5"], ["100", "12.3k"], ["150", "3"]]


def test_neighbouring_lines_differ_in_dash_and_marker_and_no_pair_of_twelve_in_colour_alone() -> None:
    looks = [(style(i).split()[1], marker(i, 0, 0)) for i in range(DASHES * MARKERS)]
    assert len(set(looks)) == len(looks)
    assert all(one[0] != other[0] and one[1] != other[1] for one, other in pairwise(looks))


def test_a_spread_chart_has_a_point_per_seed_and_names_means() -> None:
    rows = [SpreadRow("none", [0.02]), SpreadRow("feature (3 seeds)", [0.3, 0.4, 0.35]), SpreadRow("lost", [])]
    svg = spread_chart(rows, "MRR", ("chance", 0.024))
    root = ElementTree.fromstring(svg)
    assert len(root.findall("path")) == 4
    assert {"none", "feature (3 seeds)", "0.350", "no value", "chance 0.024"} <= set(_texts(svg))
    assert "lost: no value" in root.attrib["aria-label"]


def _luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(digit * 2 for digit in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_marks_have_a_contrast_of_three_and_text_of_four_and_a_half(scheme: int) -> None:
    css = (resources.files("iwm.report") / "templates" / "page.css").read_text()
    colours = dict(re.findall(r"--(\w+): #(\w+);", re.findall(r":root \{(.*?)\}", css, re.S)[scheme]))
    for name in [*(f"s{i + 1}" for i in range(COLOURS)), "good", "doubtful", "bad"]:
        assert _contrast(colours[name], colours["card"]) >= 3, name
    for name in ("ink", "soft", "link"):
        assert min(_contrast(colours[name], colours[ground]) for ground in ("card", "page")) >= 4.5, name
    assert _contrast(colours["ink"], colours["bar"]) >= 4.5

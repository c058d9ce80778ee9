"""Building blocks for sections of the page, all of them Markup: frame, text, tables and charts.

Text is given as str and escaped, HTML as Markup; join parts with `Markup().join`. The page is self-contained; colours
come from templates/page.css.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup

from iwm.report.charts import (
    ChartLine,
    ChartMark,
    SpreadRow,
    chart_card,
    chart_grid,
    legend,
    line_chart,
    mark_chart,
    spread_chart,
    unjoined,
)
from iwm.report.tables import Cell, html_table, stored_tables, table
from iwm.report.templates import call

__all__ = [
    "Cell",
    "ChartLine",
    "ChartMark",
    "SpreadRow",
    "chart_card",
    "chart_grid",
    "details",
    "html_table",
    "legend",
    "line_chart",
    "mark_chart",
    "paragraphs",
    "section",
    "spread_chart",
    "stored_tables",
    "table",
    "unjoined",
    "with_anchors",
]

TEMPLATE = "components.html"


def section(title: str, content: Markup) -> Markup:
    """Return content under its title."""
    return call(TEMPLATE, "section", title, content)


def details(title: str, content: Markup, kind: str = "") -> Markup:
    """Return content that is folded under its title; `kind` is a CSS class."""
    return call(TEMPLATE, "details", title, content, kind)


def paragraphs(texts: Sequence[str], kind: str = "", *, linked: bool = False) -> Markup:
    """Return each text as a paragraph; `kind` is a CSS class. linked: terms are links to the glossary."""
    return call(TEMPLATE, "paragraphs", texts, kind, linked)


def with_anchors(sections: Markup) -> tuple[Markup, list[tuple[str, Markup]]]:
    """Return sections with an anchor each, and the anchor and title of each of them in their order."""
    links: list[tuple[str, Markup]] = []

    def anchored(match: re.Match[str]) -> str:
        name = "-".join(re.findall(r"\w+", Markup(match[1]).striptags().lower()))
        taken = sum(title == match[1] for _, title in links)
        links.append((f"{name}-{taken + 1}" if taken else name, Markup(match[1])))
        return Markup('<section id="{}"><h2>{}</h2>').format(*links[-1])

    return Markup(re.sub(r"<section><h2>(.*?)</h2>", anchored, sections)), links

"""A result's tables are made once: the JSON, the terminal, the page and Markdown show the same cells, as plain text."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

from rich.console import Console

from iwm.evaluation.result_table import ResultTable
from iwm.evaluation.settings import BankSettings, MRRSettings
from iwm.protocols import evaluate
from iwm.report.components import html_table, stored_tables

ODD = ResultTable("Of [red] things", ["task :cat:", "a|b"], [["data/x:cat:", "[bold]1[/] <2>"]], "one\ntwo & three")


def _printed(table: ResultTable) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_json_terminal_page_and_markdown_show_the_same_cells(run: Path) -> None:
    evaluate("mrr", MRRSettings(checkpoint=run, bank=BankSettings(num_images=3, num_views=16)))
    [table] = stored_tables(json.loads((run / "eval" / "mrr.json").read_bytes()))
    assert [row[0] for row in table.rows] == [
        "pooled, teacher", "pooled, student", "per token, teacher", "per token, student",
    ]  # fmt: skip
    page = unescape((run / "report.html").read_text())
    for row in table.rows:
        assert len(row) == len(table.columns)
        assert re.search(r"\s+".join(map(re.escape, row)), _printed(table))
        assert f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) in page
        assert f"| {' | '.join(row)} |" in table.markdown()


def test_what_looks_like_markup_stays_text() -> None:
    printed = _printed(ODD)
    for words in ("Of [red] things", "task :cat:", "data/x:cat:", "[bold]1[/] <2>", "two & three"):
        assert words in printed
    assert "[bold]1[/] &lt;2&gt;" in html_table(ODD)
    assert r"| task :cat: | a\|b |" in ODD.markdown()


def test_a_page_shows_the_first_line_of_a_caption_and_folds_the_others_away() -> None:
    html = html_table(ODD)
    assert "<p>one</p>" in html[: html.index("<table>")]
    assert "<p>two &amp; three</p>" in html[html.index("<details>") :]

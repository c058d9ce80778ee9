"""Tables in a terminal of 80 columns: no word and no cell is broken, in tables of any width."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from iwm.evaluation.action_settings import CompositionSettings
from iwm.evaluation.result_table import ResultTable
from iwm.evaluation.settings import (
    BankSettings,
    CorruptionSettings,
    EvalSettings,
    ExplorerSettings,
    MRRSettings,
    RetrievalSettings,
    SimilaritySettings,
    SweepSettings,
)
from iwm.evaluation.terminal_table import layout
from iwm.protocols import evaluate
from iwm.report.components import stored_tables
from tests.evaluation.printed import assert_whole, printed

WIDE = ResultTable(
    "Wide",
    ["", *(f"number {i} of many" for i in range(9))],
    [["short", *("1.2345±0.0012",) * 9], ["a name of a row that has many more words than fit", *("0",) * 9]],
    "what it shows",
)

BANK = BankSettings(num_images=3, num_views=16)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mrr", lambda run: MRRSettings(run, bank=BANK)),
        ("retrieval", lambda run: RetrievalSettings(run, bank=BANK)),
        ("parameter-sweep", lambda run: SweepSettings(run, num_images=2, num_values=3, num_sigmas=3)),
        ("corruptions", lambda run: CorruptionSettings(run, bank=BANK, num_queries=4)),
        ("composition", lambda run: CompositionSettings(run, bank=BANK, num_queries=4)),
        ("explorer", lambda run: ExplorerSettings(run, num_images=2, num_values=2)),
        ("similarity", lambda run: SimilaritySettings(run, num_images=3, num_views=4, num_shown=2)),
    ],
)
def test_tables_of_evaluators_are_whole_at_80_columns(
    name: str, settings: Callable[[Path], EvalSettings], run: Path
) -> None:
    evaluate(name, settings(run))
    tables = stored_tables(json.loads((run / "eval" / f"{name}.json").read_bytes()))
    assert tables
    for table in tables:
        assert_whole(table)


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_columns_that_do_not_fit_stand_below_with_the_row_names_repeated(width: int) -> None:
    assert_whole(WIDE, width)
    blocks = layout(WIDE.columns, WIDE.rows, width).blocks
    assert [i for block in blocks for i, _ in block] == list(range(1, 10))
    lines = printed(WIDE, width)
    assert sum(line.startswith("short") for line in lines) == len(blocks)
    assert (len(blocks) == 1) == (width == 300)
    assert lines[0].strip() == "Wide"
    assert lines[-2].strip() == "what it shows"


def test_a_terminal_that_is_too_narrow_for_a_cell_still_shows_all_of_it() -> None:
    text = "".join(printed(WIDE, 12)).replace(" ", "")
    assert max(map(len, printed(WIDE, 12))) <= 12
    assert text.count("0") >= 9


def test_a_table_of_names_alone_is_printed() -> None:
    assert "only" in "\n".join(printed(ResultTable("Names", ["name"], [["only"]])))

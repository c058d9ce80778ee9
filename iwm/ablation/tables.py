"""Tables of an ablation study: our results (mean and range over seeds) and the paper's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iwm.ablation.cells import PAPER, cell
from iwm.ablation.evaluations import mrr_file
from iwm.ablation.protocol_tables import protocol_tables
from iwm.ablation.runs import PlannedRun, is_done, result_file
from iwm.ablation.studies import AblationStudy, Variant
from iwm.evaluation.result_table import ResultTable
from iwm.report.provenance import kind_of_images


def results(study: AblationStudy, runs: Mapping[tuple[Variant, int], PlannedRun]) -> list[dict[str, Any]]:
    """Return row, column, bank, paper, seed, folder and evaluations by file name of every variant and seed.

    Runs without all evaluations of the world model are omitted, and protocols that have not been run.
    """
    records = []
    for (variant, seed), run in runs.items():
        done = [item for item in run.evaluations if is_done(run, item)]
        if all(item in done or item.trains for item in run.evaluations):
            evaluations = {item.output: json.loads(result_file(run, item).read_bytes()) for item in done}
            place: dict[str, Any] = {"row": variant.row, "column": variant.column, "bank": variant.bank_name}
            place |= {"paper": variant.paper, "seed": seed, "folder": str(run.folder)}
            records.append({**place, "evaluations": evaluations})
    return records


def tables(
    study: AblationStudy, found: Sequence[dict[str, Any]], common: str, protocols: Sequence[str] = ()
) -> list[ResultTable]:
    """Return tables of MRR on the variants' own banks and the common bank, the control, and the variance ratio.

    With protocols first those of their scores, and figure 4's correlations.
    """
    if not found:
        return []
    seeds = sorted({result["seed"] for result in found})
    spread = f"Mean over seeds {', '.join(map(str, seeds))} (lowest–highest)." if len(seeds) > 1 else "One seed."
    sizes, views = (found[0]["evaluations"][name] for name in (mrr_file(common), "similarity"))
    images = f"{sizes['images']} {kind_of_images(sizes)}"
    bank_caption = f"{images}, bank of {sizes['bank']}, chance {sizes['chance']:.3f}. {spread}"
    ratio = (
        f"Pooled teacher features of {views['images']} images, {views['augmentations']} views each (augmentation of "
        f"{common}); an invariant encoder has 0. {spread}"
    )
    return [
        *protocol_tables(study, found, protocols, spread),
        _grid(
            study, found, "MRR on each variant's own bank", f"Pooled. {bank_caption}", _mrr("mrr", "pooled"), paper=True
        ),
        _grid(
            study, found, f"MRR on the common bank, {common}", f"Pooled. {bank_caption}", _mrr("mrr", "pooled", common)
        ),
        _grid(
            study, found, f"MRR on the common bank, {common}, per token", bank_caption, _mrr("mrr", "per_token", common)
        ),
        _grid(
            study,
            found,
            "Control: shuffled actions",
            f"Pooled, bank {common}. {bank_caption}",
            _mrr("shuffled_actions", "pooled", common),
        ),
        _grid(study, found, "Variance ratio: within images / between images", ratio, _variance_ratio),
    ]


def _mrr(part: str, distance: str, bank: str | None = None) -> Callable[[dict[str, Any]], float]:
    """Return a function that reads a score from a result, on the named bank or the variant's own."""

    def read(result: dict[str, Any]) -> float:
        value: float = result["evaluations"][mrr_file(bank or result["bank"])][part][distance]["teacher"]["mean"]
        return value

    return read


def _variance_ratio(result: dict[str, Any]) -> float:
    value: float = result["evaluations"]["similarity"]["variance_ratio"]["mean"]
    return value


def _grid(
    study: AblationStudy,
    found: Sequence[dict[str, Any]],
    title: str,
    caption: str,
    value: Callable[[dict[str, Any]], float],
    paper: bool = False,
) -> ResultTable:
    by_place: dict[tuple[str, str], list[float]] = {}
    for result in found:
        by_place.setdefault((result["row"], result["column"]), []).append(value(result))
    papers = {(variant.row, variant.column): variant.paper for variant in study.variants}
    rows = []
    for row in study.rows:
        cells = [row]
        for column in study.columns:
            known = (row, column) in papers
            printed = papers[row, column] if known and paper else None
            cells.append(cell(by_place.get((row, column), []), printed) if known else "")
        rows.append(cells)
    if paper and any(value is not None for value in papers.values()):
        caption += f" {PAPER}"
    return ResultTable(title, ["", *study.columns], rows, caption)

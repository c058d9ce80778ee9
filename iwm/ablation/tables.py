"""Tables of an ablation study: our results (mean and range over seeds) and the paper's."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from iwm.ablation.runs import PlannedRun, mrr_file
from iwm.ablation.studies import AblationStudy, Variant
from iwm.evaluation.result_table import ResultTable
from iwm.report.provenance import kind_of_images

NOT_RUN = "not run"


def results(study: AblationStudy, runs: Mapping[tuple[Variant, int], PlannedRun]) -> list[dict[str, Any]]:
    """Return row, column, bank, paper, seed, folder and evaluations by file name of every variant and seed.

    Runs without all evaluations are omitted.
    """
    records = []
    for (variant, seed), run in runs.items():
        files = {item.output: run.folder / "eval" / f"{item.output}.json" for item in run.evaluations}
        if all(file.exists() for file in files.values()):
            evaluations = {name: json.loads(file.read_bytes()) for name, file in files.items()}
            place: dict[str, Any] = {"row": variant.row, "column": variant.column, "bank": variant.bank_name}
            place |= {"paper": variant.paper, "seed": seed, "folder": str(run.folder)}
            records.append({**place, "evaluations": evaluations})
    return records


def tables(study: AblationStudy, found: Sequence[dict[str, Any]], common: str) -> list[ResultTable]:
    """Return tables of MRR on the variants' own banks and the common bank, the control, and the variance ratio."""
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
            if (row, column) not in papers:
                cells.append("")
                continue
            cell = _spread(by_place.get((row, column), []))
            printed = papers[row, column]
            cells.append(f"{cell}, paper {printed:.2f}" if paper and printed is not None else cell)
        rows.append(cells)
    if paper and any(value is not None for value in papers.values()):
        caption += " Paper: ViT-B/16, ImageNet, 300 epochs."
    return ResultTable(title, ["", *study.columns], rows, caption)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return NOT_RUN
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"

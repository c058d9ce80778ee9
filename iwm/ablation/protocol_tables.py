"""Tables of a study's downstream protocols: scores beside MRR as in table S2, and the correlations of figure 4."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from iwm.ablation.cells import PAPER, cell
from iwm.ablation.evaluations import mrr_file, protocol_file
from iwm.ablation.studies import AblationStudy, Variant
from iwm.downstream.registry import PROTOCOLS
from iwm.evaluation.paper_results import TABLE_S2
from iwm.evaluation.result_table import ResultTable
from iwm.report.equivariance import ACCURACIES, EquivariancePoint, correlation_table, correlations, paper_points
from iwm.report.results import SeedScores, protocol_result
from iwm.report.table_text import caption_of
from iwm.report.trial_selection import best_of_result


def score(record: dict[str, Any], protocol: str) -> SeedScores | None:
    """Return the score of a protocol in a record of a variant and seed; None where it was not run."""
    result = record["evaluations"].get(protocol_file(protocol))
    return None if result is None else best_of_result(protocol_result(protocol, result))


def protocol_tables(
    study: AblationStudy, found: Sequence[dict[str, Any]], protocols: Sequence[str], spread: str
) -> list[ResultTable]:
    """Return the protocols' scores in percent: one table with MRR for a study of one column, else one per protocol.

    A table with the correlations of MRR and accuracy follows. spread: sentence on the seeds.
    """
    if not protocols:
        return []
    everywhere = [found_score for item in found for name in protocols if (found_score := score(item, name))]
    remark = f"Scores in %: top-1 accuracy (mIoU for segmentation), best of several learning rates. {spread}"
    if any(variant.table_s2 for variant in study.variants):
        remark += f" {PAPER}"
    about = caption_of(remark, everywhere)
    if len(study.columns) == 1:
        columns = ["", f"{study.columns[0]}, own bank", *(PROTOCOLS[name].title for name in protocols)]
        rows = [
            [variant.row, _mrr_cell(variant, found), *(_cell(variant, found, name) for name in protocols)]
            for variant in study.variants
        ]
        tables = [ResultTable(study.title, columns, rows, about)]
    else:
        tables = [
            ResultTable(PROTOCOLS[name].title, ["", *study.columns], _grid(study, found, name), about)
            for name in protocols
        ]
    correlated = correlation_table(study_points(study, found, protocols), protocols)
    return tables if correlated is None else [*tables, correlated]


def _grid(study: AblationStudy, found: Sequence[dict[str, Any]], protocol: str) -> list[list[str]]:
    places = {(variant.row, variant.column): variant for variant in study.variants}
    return [
        [
            row,
            *(
                _cell(places[row, column], found, protocol) if (row, column) in places else ""
                for column in study.columns
            ),
        ]
        for row in study.rows
    ]


def _cell(variant: Variant, found: Sequence[dict[str, Any]], protocol: str) -> str:
    values = [100 * own.mean for item in _of(variant, found) if (own := score(item, protocol))]
    printed = None
    if variant.table_s2 is not None and protocol in ACCURACIES:
        printed = TABLE_S2[variant.table_s2][ACCURACIES[protocol]]
    return cell(values, printed, ours=1, theirs=1)


def _mrr_cell(variant: Variant, found: Sequence[dict[str, Any]]) -> str:
    return cell([_mrr(item) for item in _of(variant, found)], variant.paper)


def _of(variant: Variant, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [item for item in found if (item["row"], item["column"]) == (variant.row, variant.column)]


def _mrr(record: dict[str, Any]) -> float:
    value: float = record["evaluations"][mrr_file(record["bank"])]["mrr"]["pooled"]["teacher"]["mean"]
    return value


def study_points(
    study: AblationStudy, found: Sequence[dict[str, Any]], protocols: Sequence[str]
) -> list[EquivariancePoint]:
    """Return MRR on the variant's own bank and the accuracies of figure 4 of each variant, means over its seeds."""
    points = []
    for variant in study.variants:
        records = _of(variant, found)
        by_protocol = {name: [own.mean for item in records if (own := score(item, name))] for name in protocols}
        accuracies = {
            name: 100 * statistics.mean(values) for name, values in by_protocol.items() if values and name in ACCURACIES
        }
        if accuracies:
            name = variant.row if len(study.columns) == 1 else f"{variant.row}, {variant.column}"
            points.append(EquivariancePoint(name, statistics.mean(map(_mrr, records)), accuracies))
    return points


def correlation_record(
    study: AblationStudy, found: Sequence[dict[str, Any]], protocols: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Return Pearson's correlation of MRR with the accuracy of each protocol of figure 4, ours and the paper's."""
    return {
        "ours": correlations(study_points(study, found, protocols), protocols),
        "paper": correlations(paper_points(), protocols),
    }

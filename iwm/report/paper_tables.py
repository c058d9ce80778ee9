"""The paper's downstream tables (3 to 8, S1, S3 to S5) with the runs' own results.

The best of several learning rates is shown, as in the paper; several seeds give mean and standard deviation.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from iwm.evaluation import paper_results
from iwm.evaluation.result_table import ResultTable
from iwm.report.results import DatasetResults, SeedScores, best_trials, read_dataset_results
from iwm.report.runs import ReportError, RunResults, read_runs
from iwm.report.table_text import OurRow, caption, cell, comparison_table, gain, paper_row, percent
from iwm.report.trial_selection import best_probes, finetuned, prediction, trains

ACCURACY = "Top-1 accuracy in %; the paper's on ImageNet at 224 px."

PREDICTION_TASKS: dict[str, tuple[bool, bool, bool]] = {
    "Default": (False, False, False),
    "+ Teacher": (False, True, False),
    "+ Null latents": (True, True, False),
    "+ Pred only one token": (True, True, True),
}
"""Settings of table 3 as keys of table S3: (null latents, teacher features, one token)."""


def markdown(tables: Sequence[ResultTable]) -> str:
    """Return the tables as Markdown."""
    return "\n".join(table.markdown() for table in tables)


def paper_tables(folders: Sequence[Path]) -> list[ResultTable]:
    """Return all tables for which one of the run folders has a result, in the paper's order.

    Raises ReportError for a path that is not a folder, an incomplete result, and folders without results.
    """
    tables = paper_tables_of(read_runs(folders))
    if not tables:
        raise ReportError(
            f"{', '.join(map(str, folders))}: no downstream results in eval/ for any table; run a protocol first, for "
            "example iwm evaluate linear --checkpoint RUN"
        )
    return tables


def paper_tables_of(runs: Sequence[RunResults]) -> list[ResultTable]:
    """Return all tables for which one of the runs has a result; an empty list without results."""
    datasets = [dataset for run in runs for dataset in read_dataset_results(run)]
    base = [dataset for dataset in datasets if not dataset.large]
    tables = [
        _table_3(base),
        _finetuning_table("Table 4: finetuning evaluations", paper_results.TABLE_4, base),
        _table_5(base),
        _table_6(datasets),
        _table_7(datasets),
        _table_8(base),
        _finetuning_table("Table S1: finetuning evaluations, complete", paper_results.TABLE_S1, base),
        _table_s3(base),
        _table_s4([dataset for dataset in datasets if dataset.large]),
        _table_s5(datasets),
    ]
    return [table for table in tables if table]


def _table_3(datasets: Sequence[DatasetResults]) -> ResultTable | None:
    printed = {
        name: percent(top1) + (f" ({gap:+.1f})" if gap is not None else "")
        for name, (top1, gap) in paper_results.TABLE_3.items()
    }
    return _prediction_table(
        "Table 3: prediction settings for predictor finetuning", printed, PREDICTION_TASKS, datasets, gaps=True
    )


def _table_s3(datasets: Sequence[DatasetResults]) -> ResultTable | None:
    names = {
        task: f"{'null' if task[0] else 'random'} latents, {'teacher' if task[1] else 'student'}, "
        f"{'one token' if task[2] else 'whole image'}"
        for task in paper_results.TABLE_S3
    }
    printed = {names[task]: percent(top1) for task, top1 in paper_results.TABLE_S3.items()}
    places = {name: task for task, name in names.items()}
    return _prediction_table("Table S3: prediction tasks", printed, places, datasets, gaps=False)


def _prediction_table(
    title: str,
    printed: Mapping[str, str],
    places: Mapping[str, tuple[bool, bool, bool]],
    datasets: Sequence[DatasetResults],
    gaps: bool,
) -> ResultTable | None:
    """Return one row per setting of the paper, and one column per data set with at least two of them."""
    ours = []
    for dataset in datasets:
        scores = [best_trials(dataset.records, "finetune-predictor", prediction(*task)) for task in places.values()]
        present = [score for score in scores if score]
        if len(present) > 1:
            before = [None, *scores[:-1]] if gaps else [None] * len(scores)
            cells = [cell(score, above) for score, above in zip(scores, before, strict=True)]
            ours.append(OurRow(_row_name(dataset), cells, present))
    if not ours:
        return None
    rows = [[name, printed[name], *(column.cells[i] for column in ours)] for i, name in enumerate(places)]
    return ResultTable(title, ["", "paper", *(column.name for column in ours)], rows, caption(ACCURACY, ours))


def _finetuning_table(
    title: str, rows: Sequence[paper_results.FinetuningRow], datasets: Sequence[DatasetResults]
) -> ResultTable | None:
    printed = {
        paper_row(row.method, row.epochs): [
            percent(row.encoder),
            percent(row.random),
            percent(row.pretrained) + ("" if row.gain is None else f" ({row.gain:+.1f})"),
            percent(row.end_to_end),
        ]
        for row in rows
    }

    def ours(dataset: DatasetResults) -> OurRow:
        scores = finetuned(dataset)
        cells = [cell(score, scores["random"] if name == "pretrained" else None) for name, score in scores.items()]
        return OurRow(_row_name(dataset), cells, [score for score in scores.values() if score])

    columns = ["encoder", "frozen, random predictor", "frozen, pretrained predictor", "end to end"]
    return comparison_table(title, ACCURACY, columns, printed, map(ours, datasets))


def _table_5(datasets: Sequence[DatasetResults]) -> ResultTable | None:
    printed = {
        paper_row(row.method, row.epochs): [percent(row.frozen), percent(row.any_protocol)]
        for row in paper_results.TABLE_5
    }

    def ours(dataset: DatasetResults) -> OurRow:
        tuned, probed = finetuned(dataset), best_probes(dataset)
        frozen = [score for score in (*probed.values(), tuned["random"], tuned["pretrained"]) if score]
        finetuned_encoder = [score for score in (tuned["encoder"], tuned["end to end"]) if score]
        peaks = [
            max(scores, key=lambda s: s.mean) if scores else None
            for scores in (frozen, finetuned_encoder and frozen + finetuned_encoder)
        ]
        cells = [f"{cell(peak)} ({peak.record.protocol})" if peak else "" for peak in peaks]
        return OurRow(_row_name(dataset), cells, [peak for peak in peaks if peak])

    remark = f"{ACCURACY} Any protocol: best of all protocols that were run, if one of them finetunes the encoder."
    return comparison_table(
        "Table 5: peak performance", remark, ["frozen encoder", "any protocol"], printed, map(ours, datasets)
    )


def _table_6(datasets: Sequence[DatasetResults]) -> ResultTable | None:
    return _parts_table(
        "Table 6: segmentation",
        "mIoU in %; the paper's on ADE20k.",
        paper_results.TABLE_6,
        datasets,
        lambda dataset: [
            best_trials(dataset.records, "segmentation", trains(part))
            for part in ("encoder", "predictor", "end-to-end")
        ],
    )


def _table_s4(datasets: Sequence[DatasetResults]) -> ResultTable | None:
    def scores(dataset: DatasetResults) -> list[SeedScores | None]:
        by_column = finetuned(dataset)
        return [by_column["encoder"], by_column["pretrained"], by_column["end to end"]]

    return _parts_table("Table S4: ViT-L/16", ACCURACY, paper_results.TABLE_S4, datasets, scores)


def _parts_table(
    title: str,
    remark: str,
    rows: Sequence[paper_results.PartsRow],
    datasets: Sequence[DatasetResults],
    scores: Callable[[DatasetResults], list[SeedScores | None]],
) -> ResultTable | None:
    printed = {paper_row(row.method, 300): [percent(value) for value in row[1:]] for row in rows}
    ours = (
        OurRow(_row_name(dataset), [cell(score) for score in row], [score for score in row if score])
        for dataset, row in ((dataset, scores(dataset)) for dataset in datasets)
    )
    return comparison_table(title, remark, ["encoder", "predictor", "end to end"], printed, ours)


def _table_7(datasets: Sequence[DatasetResults]) -> ResultTable | None:
    printed = {
        f"paper: {name}": [percent(row.single), percent(row.multi), f"{row.difference:+.1f}"]
        for name, row in paper_results.TABLE_7.items()
    }
    ours = []
    shown = [dataset for dataset in datasets if any(len(record.tasks) > 1 for record in dataset.records)]
    for dataset in shown:
        pairs = []
        alone = [other.name for other in shown].count(dataset.name) == 1
        prefix = f"ours: {dataset.name}" if alone else _row_name(dataset)
        for name in dict.fromkeys(task for record in dataset.records for task in record.tasks if task):
            single = best_trials(dataset.records, "multitask", lambda trial: len(trial.scores) == 1, name)
            multi = best_trials(dataset.records, "multitask", lambda trial: len(trial.scores) > 1, name)
            if single or multi:
                pairs.append((single, multi))
                cells = [cell(single), cell(multi), gain(multi, single)]
                ours.append(OurRow(f"{prefix}: {name}", cells, [s for s in (single, multi) if s]))
        complete = [(single.mean, multi.mean) for single, multi in pairs if single and multi]
        if len(pairs) > 1 and len(complete) == len(pairs):
            single_mean, multi_mean = (100 * statistics.mean(values) for values in zip(*complete, strict=True))
            cells = [percent(single_mean), percent(multi_mean), f"{multi_mean - single_mean:+.1f}"]
            ours.append(OurRow(f"{prefix}: Average", cells, [multi for _, multi in pairs if multi]))
    columns = ["single-task", "multi-task", "difference"]
    return comparison_table("Table 7: multitask finetuning", "Top-1 accuracy in %.", columns, printed, ours)


def _table_8(datasets: Sequence[DatasetResults]) -> ResultTable | None:
    printed = {
        paper_row(row.method, row.epochs): [percent(row.linear), percent(row.attentive)]
        for row in paper_results.TABLE_8
    }

    def ours(dataset: DatasetResults) -> OurRow:
        scores = best_probes(dataset)
        return OurRow(_row_name(dataset), [cell(score) for score in scores.values()], [s for s in scores.values() if s])

    return comparison_table(
        "Table 8: linear and attentive probing", ACCURACY, ["linear", "attentive"], printed,
        map(ours, datasets),
    )  # fmt: skip


def _table_s5(datasets: Sequence[DatasetResults]) -> ResultTable | None:
    """Return one row per run with all its data sets; data sets that the paper lacks get extra columns."""
    columns = list(next(iter(paper_results.TABLE_S5.values())))
    known = {_squeezed(name): name for name in columns}
    by_run: dict[str, dict[str, SeedScores]] = {}
    for dataset in datasets:
        score = best_probes(dataset)["attentive"]
        if score:
            by_run.setdefault(dataset.name, {})[known.get(_squeezed(dataset.data), dataset.data)] = score
    columns += dict.fromkeys(name for scores in by_run.values() for name in scores if name not in columns)
    printed = {
        paper_row(method, 300): [percent(row.get(name)) for name in columns]
        for method, row in paper_results.TABLE_S5.items()
    }
    ours = (
        OurRow(f"ours: {run}", [cell(scores.get(name)) for name in columns], list(scores.values()))
        for run, scores in by_run.items()
    )
    title = "Table S5: attentive probing on several data sets"
    return comparison_table(title, "Top-1 accuracy in %.", columns, printed, ours)


def _row_name(dataset: DatasetResults) -> str:
    return f"ours: {dataset.name}; {dataset.data}"


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

"""Section of the report on mean reciprocal rank, and on how the MRRs of a page relate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from iwm.evaluation.mrr import WAYS, way_name
from iwm.evaluation.result_table import ResultTable, format_mean_stderr
from iwm.report.components import details, html_table, paragraphs, section, stored_tables
from iwm.report.provenance import TITLES, kind_of_images, origin
from iwm.report.runs import ReportError, RunResults
from iwm.training.checkpoint import run_dir_of

MEANING = (
    "Mean reciprocal rank of the true view among the jittered views of an image, by distance to the prediction, ± "
    "standard error over images. Shuffled actions: predictions with another view's action. Teacher, student: encoder "
    "of the clean image."
)

SEVERAL = (
    "These scores differ because their banks differ: the more views a bank has, the lower are MRR and chance, and the "
    "more times chance a good model reaches. Images, distance and source differ too. Compare only scores of equal "
    "banks. The explorer's score is the mean over its photographs; it shows that of one."
)


def world_model(runs: Sequence[RunResults]) -> Markup:
    """Return MRR with its control: one row per distance and encoder for a single run, else one row per run."""
    names = sorted({name for run in runs for name in run.evaluations_of("mrr")})
    if not names:
        return Markup()
    if len(runs) == 1:
        content = _of_one(runs[0], names) + _reconciled(runs[0])
    else:
        content = Markup().join(_by_run(runs, name) for name in names)
    return section(TITLES["mrr"], paragraphs([MEANING], linked=True) + content)


def _of_one(run: RunResults, names: Sequence[str]) -> Markup:
    tables = []
    for name in names:
        result = run.evaluations[name]
        for stored in stored_tables(result):
            caption = f"{stored.caption}. {origin(run, result)}"
            tables.append(html_table(replace(stored, title=name, caption=caption)))
    return Markup().join(tables)


def _by_run(runs: Sequence[RunResults], name: str) -> Markup:
    """Return the table of one MRR file name, because runs may be evaluated on several banks."""
    rows = []
    for run in runs:
        result = run.evaluations.get(name)
        if result is not None:
            scores = [result["mrr"][distance][encoder] for distance, encoder in WAYS]
            scores.append(result["shuffled_actions"]["pooled"]["teacher"])
            images = f"{result['images']} {kind_of_images(result)}"
            rows.append(
                [run.name, *map(format_mean_stderr, scores), f"{result['chance']:.3f}", str(result["bank"]), images]
            )
    columns = ["run", *(way_name(*way) for way in WAYS), "shuffled actions, pooled", "chance", "bank", "images"]
    return details(name, html_table(ResultTable("Mean reciprocal rank ± standard error", columns, rows)))


# The MRRs of a page


def _reconciled(run: RunResults) -> Markup:
    """Return one row for each MRR on the page with its bank; '' where there is only one."""
    rows = list(_scores_of(run))
    if len(rows) < 2:
        return Markup()
    columns = ["where", "MRR", "times chance", "chance", "bank", "images", "distance, source", "model"]
    return html_table(ResultTable("Why the MRRs on this page differ", columns, rows, SEVERAL))


def _scores_of(run: RunResults) -> Iterator[list[str]]:
    if "mrr_pooled" in run.metrics and "mrr_chance" in run.metrics:
        bank, images = _small_bank(run)
        (step, mrr), (_, chance) = (run.metrics[name][-1] for name in ("mrr_pooled", "mrr_chance"))
        model = f"{run.name}, step {step:,.0f}"
        yield _row("training, small bank", [mrr], chance, bank, images, "pooled, clean image", model)
    for name, result in run.evaluations_of("mrr").items():
        mrr = result["mrr"]["pooled"]["teacher"]["mean"]
        how = "pooled, clean image"
        yield _row(name, [mrr], result["chance"], result["bank"], result["images"], how, _model(result))
    for name, result in run.evaluations_of("corruptions").items():
        distance = result["distance"].replace("_", " ")
        corrupted = [op["with_action"]["mean"] for op in result["ops"]]
        for scores, source in (([result["clean"]["with_action"]["mean"]], "clean"), (corrupted, "corrupted")):
            how = f"{distance}, {source} image"
            yield _row(name, scores, result["chance"], result["bank"], result["images"], how, _model(result))
    for name, result in run.evaluations_of("explorer").items():
        mrr, images = result["sources"][0]["mrr"], len(result["photographs"])
        yield _row(name, [mrr], result["chance"], result["bank"], images, "pooled, clean image", _model(result))


def _small_bank(run: RunResults) -> tuple[int | str, int | str]:
    """Return views and images of training's bank, '' where the configuration is missing or of another version."""
    try:
        config = run.parse_config()
    except ReportError:  # the facts at the top of the page say so
        config = None
    return ("", "") if config is None else (config.log.eval_bank_size, config.log.eval_images)


def _model(result: dict[str, Any]) -> str:
    """Return run folder and file of the evaluated checkpoint; '' for a result that does not name it."""
    if "checkpoint" not in result:
        return ""
    checkpoint = Path(result["checkpoint"])
    return f"{run_dir_of(checkpoint).name}, {checkpoint.name}".removeprefix(", ")


def _row(
    where: str, scores: Sequence[float], chance: float, bank: int | str, images: int | str, how: str, model: str
) -> list[str]:
    """Return a row; several scores are shown as their range."""
    ends = sorted({min(scores), max(scores)})
    mrr = " to ".join(f"{end:.3f}" for end in ends)
    times = " to ".join(f"{end / chance:.1f}" for end in ends)
    return [where, mrr, times, f"{chance:.3f}", str(bank), str(images), how, model]

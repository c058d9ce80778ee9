"""Cell text and captions of the paper's tables: scores in percent with their deviation, gains, details of results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from iwm.evaluation.result_table import ResultTable
from iwm.report.results import SeedScores

OURS = (
    "Ours: best of several learning rates, ± standard error over held-out images; with several seeds, mean ± sample "
    "standard deviation over seeds."
)


@dataclass(frozen=True)
class OurRow:
    """Row or column of our results: cell text, and the scores in it."""

    name: str
    cells: list[str]
    scores: list[SeedScores]


def comparison_table(
    title: str, remark: str, columns: list[str], printed: Mapping[str, list[str]], ours: Iterable[OurRow]
) -> ResultTable | None:
    """Return the paper's rows followed by our rows; None where no row of ours has a score."""
    present = [row for row in ours if row.scores]
    if not present:
        return None
    rows = {**printed, **{row.name: row.cells for row in present}}
    return ResultTable(
        title, ["", *columns], [[name, *cells] for name, cells in rows.items()], caption(remark, present)
    )


def caption(remark: str, ours: Sequence[OurRow]) -> str:
    """Return the remark on our results, and one line for each of them: data, images, training length, speed."""
    return caption_of(f"{remark} {OURS}", [score for row in ours for score in row.scores])


def caption_of(remark: str, scores: Sequence[SeedScores]) -> str:
    """Return the remark, and one line for each of the scores' results: data, images, training length, speed."""
    rates: dict[str, list[str]] = {}
    for score in scores:
        known = rates.setdefault(_description(score), [])
        if score.images_per_second is not None:
            known.append(f"{score.images_per_second:,.0f}")
    lines = [remark]
    for description, known in rates.items():
        speed = f", {' and '.join(dict.fromkeys(known))} images/s in training" if known else ""
        lines.append(f"{description}{speed}.")
    return "\n".join(lines)


def _description(score: SeedScores) -> str:
    record, task = score.record, score.task
    chance = "" if task.chance is None else f" (chance {100 * task.chance:.1f})"
    return (
        f"{record.protocol} on {task.data}: {record.encoder}, {record.checkpoint}; {record.choice}; "
        f"{task.classes} classes{chance}, "
        f"{task.train_images:,} training and {task.val_images:,} held-out images, {record.epochs:.4g} epochs, "
        f"batch {record.batch:,}"
    )


def cell(score: SeedScores | None, before: SeedScores | None = None) -> str:
    """Format a score in percent, with its gain over `before` if there is one."""
    if score is None:
        return ""
    spread = "" if score.spread is None else f" ± {100 * score.spread:.1f}"
    seeds = f", {len(score.seeds)} seeds" if len(score.seeds) > 1 else ""
    more = f" ({gain(score, before)})" if before else ""
    return f"{100 * score.mean:.1f}{spread}{seeds}{more}"


def gain(score: SeedScores | None, before: SeedScores | None) -> str:
    """Format a gain in points; over several common seeds, mean difference and its sample standard deviation."""
    if score is None or before is None:
        return ""
    if len(score.seeds) > 1 and score.seeds.keys() == before.seeds.keys():
        gains = [100 * (measure.mean - before.seeds[seed].mean) for seed, measure in score.seeds.items()]
        return f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f}"
    return f"{100 * (score.mean - before.mean):+.1f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def paper_row(method: str, epochs: int) -> str:
    return f"paper: {method}, {epochs:,} epochs"

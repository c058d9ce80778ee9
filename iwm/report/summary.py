"""Top of the page: title, verdict, facts on the run and its main scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from iwm.report.axes import number
from iwm.report.provenance import kind_of_images, training_images
from iwm.report.run_facts import facts
from iwm.report.runs import ReportError, RunResults
from iwm.report.templates import render
from iwm.report.verdict import verdict


@dataclass(frozen=True)
class ScoreTile:
    """One number in large type; `name` and `note` may hold terms of the glossary."""

    name: str
    value: str
    note: str


def summary(runs: Sequence[RunResults]) -> Markup:
    """Return the title and, for a single run, verdict, facts and tiles; then warnings of all runs."""
    if len(runs) > 1:
        title = render("summary.html", kind="Image World Models · comparison", name=f"{len(runs)} runs", verdict=None)
        return title + training_images(runs)
    run = runs[0]
    name = main_mrr(runs)
    result = None if name is None else run.evaluations[name]
    top = render(
        "summary.html",
        kind="Image World Model · run",
        name=run.name,
        verdict=verdict(result, _conditioning(run)),
        facts=facts(run),
        tiles=_tiles(run, result),
    )
    return top + training_images(runs)


def main_mrr(runs: Sequence[RunResults]) -> str | None:
    """Return the name of the MRR file that most runs have; ties go to `mrr`, then to the first name."""
    names = [name for run in runs for name in run.evaluations_of("mrr")]
    return min(names, key=lambda name: (-names.count(name), name != "mrr", name), default=None)


def speed(run: RunResults) -> float | None:
    """Return the median of a run's images/s; None without metrics."""
    values = [value for _, value in run.metrics.get("images_per_second", [])]
    return statistics.median(values) if values else None


def _conditioning(run: RunResults) -> str | None:
    try:
        config = run.parse_config()
    except ReportError:  # the facts below the verdict say so
        return None
    return None if config is None else config.action.conditioning


def _tiles(run: RunResults, result: dict[str, Any] | None) -> list[ScoreTile]:
    tiles = []
    if result is not None:
        mrr, shuffled = (result[key]["pooled"]["teacher"] for key in ("mrr", "shuffled_actions"))
        note = f"± {mrr['standard_error']:.3f}, {kind_of_images(result)}"
        tiles.append(ScoreTile("MRR, pooled", f"{mrr['mean']:.3f}", note))
        tiles.append(ScoreTile("with shuffled actions", f"{shuffled['mean']:.3f}", f"chance {result['chance']:.3f}"))
    if "loss" in run.metrics:
        step, loss = run.metrics["loss"][-1]
        tiles.append(ScoreTile("loss", f"{loss:.3f}", f"at step {step:,.0f}"))
    images_per_second = speed(run)
    if images_per_second is not None:
        tiles.append(ScoreTile("images/s", number(round(images_per_second)), "median of the run"))
    return tiles

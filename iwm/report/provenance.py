"""Origin of the results on the page: checkpoint and images of each, notes, and why something was left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from iwm.evaluation.registry import EVALUATORS, WORLD_MODEL
from iwm.report.components import paragraphs, section
from iwm.report.runs import RunResults


def is_held_out(result: dict[str, Any]) -> bool:
    """Return False where the model was trained on the images of a result."""
    held_out: bool = result.get("data", {}).get("held_out", True)
    return held_out


def kind_of_images(result: dict[str, Any]) -> str:
    return "held-out images" if is_held_out(result) else "training images"


def left_out(run: RunResults) -> dict[str, str]:
    """Return the reasons by evaluator that the run's last `world-model` left out, without those that ran later."""
    reasons: dict[str, str] = run.evaluations.get(WORLD_MODEL, {}).get("left_out", {})
    return reasons


def origin(run: RunResults, result: dict[str, Any]) -> str:
    """Return the checkpoint, the images and the notes of a result as text; '' where it has none of them."""
    parts = [Path(result["checkpoint"]).name] if "checkpoint" in result else []
    if "data" in result:
        data = result["data"]
        trained = "" if is_held_out(result) else ", on which the model was trained"
        parts.append(f"split '{data['split']}' of {data['shards']}{trained}")
    parts += result.get("notes", [])
    if not parts:
        return ""
    reason = left_out(run).get(result["protocol"])
    earlier = f"Earlier result: the last world-model left this evaluator out: {reason}. " if reason else ""
    return f"{earlier}{'. '.join(parts)}."


def origin_paragraph(run: RunResults, result: dict[str, Any]) -> Markup:
    """Return `origin`, and what the evaluator left out with the reasons, as paragraphs."""
    text = origin(run, result)
    parts = result.get("left_out", {}) if result["protocol"] in EVALUATORS else {}
    return paragraphs([text] if text else []) + paragraphs([f"Left out, {name}: {parts[name]}." for name in parts])


def training_images(runs: Sequence[RunResults]) -> Markup:
    """Return a warning for each run with results on images that its model was trained on; '' where there is none."""
    warnings = []
    for run in runs:
        results = (result for result in run.evaluations.values() if result["protocol"] in EVALUATORS)
        notes = dict.fromkeys(result["data"].get("note", "") for result in results if not is_held_out(result))
        name = "" if len(runs) == 1 else f"{run.name}: "
        warnings += [f"{name}{note}." for note in notes]
    return paragraphs(warnings, "warning")


TITLES = {
    "mrr": "Mean reciprocal rank",
    "retrieval": "Retrieval",
    "parameter-sweep": "Parameter sweeps",
    "corruptions": "Undoing corruptions",
    "composition": "Actions in a row",
    "infer-action": "Inferred actions",
    "explorer": "Explorer",
    "similarity": "Similarity of augmented views",
    "marginalisation": "Marginalised representations",
    "feature-maps": "Patch features",
    "knn": "Nearest neighbours",
}
"""Titles of the evaluators' sections."""


def left_out_section(run: RunResults, evaluator: str) -> Markup:
    """Return a section with the reason why the last `world-model` left an evaluator out; '' where it did not."""
    reason = left_out(run).get(evaluator)
    return Markup() if reason is None else section(TITLES[evaluator], paragraphs([f"Left out: {reason}."]))


def not_evaluated(run: RunResults) -> Markup:
    """Return the evaluators that have neither a result nor a reason, and the command for them; '' where all have."""
    known = {result["protocol"] for result in run.evaluations.values()} | left_out(run).keys()
    missing = [name for name in EVALUATORS if name not in known]
    if not missing:
        return Markup()
    command = "iwm evaluate world-model --checkpoint RUN runs all of them."
    return paragraphs([f"Not evaluated: {', '.join(missing)}. {command}"], "note")

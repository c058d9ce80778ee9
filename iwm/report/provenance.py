"""Origin of the results on the page: checkpoint and images of each, notes, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from iwm.evaluation.registry import EVALUATORS, WORLD_MODEL
from iwm.report.components import section
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
    is_earlier = result["protocol"] in left_out(run)
    earlier = "Earlier result: the last world-model left this evaluator out. " if is_earlier else ""
    return f"{earlier}{'. '.join(parts)}."


def origin_paragraph(run: RunResults, result: dict[str, Any]) -> str:
    """Return `origin` as HTML."""
    text = origin(run, result)
    return f"<p>{escape(text)}</p>" if text else ""


def training_images(runs: Sequence[RunResults]) -> str:
    """Return a warning for each run with results on images that its model was trained on; '' where there is none."""
    warnings = []
    for run in runs:
        results = (result for result in run.evaluations.values() if result["protocol"] in EVALUATORS)
        notes = dict.fromkeys(result["data"].get("note", "") for result in results if not is_held_out(result))
        name = "" if len(runs) == 1 else f"{run.name}: "
        warnings += [f'<p class="warning">{escape(name + note)}.</p>' for note in notes]
    return "".join(warnings)


def left_out_section(run: RunResults) -> str:
    """Return what the last `world-model`, and each evaluator, left out, with the reasons; '' where nothing was."""
    reasons = dict(left_out(run))
    for name, result in run.evaluations.items():
        if result["protocol"] in EVALUATORS:
            reasons |= {f"{name}, {part}": reason for part, reason in result.get("left_out", {}).items()}
    lines = "".join(f"<p><b>{escape(name)}</b>: {escape(reason)}.</p>" for name, reason in reasons.items())
    return section("Left out", lines) if lines else ""

"""How runs were made: in what they differ, their configurations, and each evaluation's settings and versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from iwm.report.comparison import differing
from iwm.report.markup import details, section, table
from iwm.report.run_folder import Run

HOW = ("checkpoint", "data", "settings", "seed", "device", "precision", "versions", "seconds")
"""Fields of an evaluation that say how it was made."""


def configuration(runs: Sequence[Run]) -> str:
    """Where runs differ; folded away, the resolved configuration and the versions of each."""
    if len(runs) == 1:
        content = _of_one(runs[0])
    else:
        each = ((run.name, _of_one(run)) for run in runs)
        folded = "".join(details(name, made) for name, made in each if made)
        content = _differences(runs) + (details("All of each run", folded) if folded else "")
    return section("How it was made", content) if content else ""


def _of_one(run: Run) -> str:
    parts = []
    if run.config is not None:
        parts.append(details("Configuration", f"<pre>{escape(run.config)}</pre>"))
    for name, result in run.evaluations.items():
        how = json.dumps({key: result[key] for key in HOW if key in result}, indent=1)
        parts.append(details(f"Evaluation {name}: settings and versions", f"<pre>{escape(how)}</pre>"))
    return "".join(parts)


def _differences(runs: Sequence[Run]) -> str:
    """A row per field of the configuration, or version, that is not the same in all runs; a column per run."""
    fields = differing(runs) | _versions(runs)
    if not fields:
        return "<p>The configurations do not differ.</p>"
    rows = (
        f'<th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(_plain(value))}</td>" for value in values)
        for name, values in fields.items()
    )
    return "<h3>Where they differ</h3>" + table(["field", *(run.name for run in runs)], rows)


def _versions(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Versions that evaluations were made with, where runs differ in them."""
    found = []
    for run in runs:
        merged: dict[str, set[str]] = {}
        for result in run.evaluations.values():
            for package, version in result.get("versions", {}).items():
                merged.setdefault(package, set()).add(version)
        found.append({package: ", ".join(sorted(versions)) for package, versions in merged.items()})
    packages = {package: None for each in found for package in each}
    columns = {f"version of {package}": [each.get(package) for each in found] for package in packages}
    return {name: values for name, values in columns.items() if len({v for v in values if v is not None}) > 1}


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)

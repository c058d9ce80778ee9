"""Configuration section of the report: differences of runs, and settings and versions of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from iwm.evaluation.result_table import ResultTable
from iwm.report.components import details, html_table, paragraphs, section
from iwm.report.runs import RunResults, differing_fields, setting_text
from iwm.report.short_paths import short_paths_of_yaml
from iwm.report.templates import render

PROVENANCE = ("checkpoint", "data", "settings", "seed", "device", "precision", "versions", "seconds")
"""Fields of an evaluation for reproducing it."""


def configuration(runs: Sequence[RunResults]) -> Markup:
    """Return the differences of runs and, folded, the resolved configuration and versions of each run."""
    if len(runs) == 1:
        content = _of_one(runs[0])
    else:
        contents = ((run.name, _of_one(run)) for run in runs)
        folded = Markup().join(details(name, text) for name, text in contents if text)
        content = _differences(runs) + (details("All fields of each run", folded) if folded else Markup())
    return section("Configuration", content) if content else Markup()


def _of_one(run: RunResults) -> Markup:
    parts = []
    if run.config is not None:
        parts.append(_listing("config.yaml", short_paths_of_yaml(run.config)))
    if run.record is not None:
        parts.append(_listing("run.json: every start of the training", json.dumps(run.record, indent=1)))
    for name, result in run.evaluations.items():
        provenance = {key: result[key] for key in PROVENANCE if key in result}
        title = f"Evaluation {name}: settings and versions"
        parts.append(_listing(title, json.dumps(provenance, indent=1, ensure_ascii=False)))
    return Markup().join(parts)


def _listing(title: str, text: str) -> Markup:
    return details(title, render("listing.html", text=text, title=title))


def _differences(runs: Sequence[RunResults]) -> Markup:
    """Return a table of configuration fields and versions that differ, with one column per run."""
    fields = differing_fields(runs) | _versions(runs)
    if not fields:
        return paragraphs(["The configurations do not differ."])
    rows = [[name, *map(setting_text, values)] for name, values in fields.items()]
    return html_table(ResultTable("Differing fields", ["field", *(run.name for run in runs)], rows))


def _versions(runs: Sequence[RunResults]) -> dict[str, list[Any]]:
    """Return the package versions of evaluations that differ between runs."""
    by_run = []
    for run in runs:
        merged: dict[str, set[str]] = {}
        for result in run.evaluations.values():
            for package, version in result.get("versions", {}).items():
                merged.setdefault(package, set()).add(version)
        by_run.append({package: ", ".join(sorted(versions)) for package, versions in merged.items()})
    packages = {package: None for versions in by_run for package in versions}
    columns = {f"version of {package}": [versions.get(package) for versions in by_run] for package in packages}
    return {name: values for name, values in columns.items() if len({v for v in values if v is not None}) > 1}

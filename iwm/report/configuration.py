"""How a run was made: its configuration, and each evaluation's settings and versions."""

from __future__ import annotations

import json
from html import escape

from iwm.report.markup import details, section
from iwm.report.run_folder import Run

HOW = ("checkpoint", "data", "settings", "seed", "device", "precision", "versions", "seconds")
"""Fields of an evaluation that say how it was made."""


def configuration(run: Run) -> str:
    """The resolved configuration and the versions, folded away."""
    parts = []
    if run.config is not None:
        parts.append(details("Configuration", f"<pre>{escape(run.config)}</pre>"))
    for name, result in run.evaluations.items():
        how = json.dumps({key: result[key] for key in HOW if key in result}, indent=1)
        parts.append(details(f"Evaluation {name}: settings and versions", f"<pre>{escape(how)}</pre>"))
    return section("How it was made", "".join(parts)) if parts else ""

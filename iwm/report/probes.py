"""How well features classify: accuracies of what was probed."""

from __future__ import annotations

from html import escape

from iwm.evaluation import knn
from iwm.report.markup import mean_and_error, section, table
from iwm.report.run_folder import Run


def nearest_neighbours(run: Run) -> str:
    """Accuracy of a vote among the nearest training images."""
    parts = []
    for result in run.of_protocol("knn").values():
        ks = list(next(iter(result["accuracy"].values())))
        rows = []
        for context, scores in result["accuracy"].items():
            cells = (f"<td>{mean_and_error(score, digits=1, times=100)}</td>" for score in scores.values())
            rows.append(f"<td>{escape(context)}</td>{''.join(cells)}")
        parts.append(table(("encoder", *(f"k = {k}" for k in ks)), rows) + f"<p>{escape(knn.caption(result))}</p>")
    return section("Nearest neighbours, accuracy in %", "".join(parts)) if parts else ""

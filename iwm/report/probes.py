"""How well features classify: accuracies of what was probed."""

from __future__ import annotations

from html import escape

from iwm.evaluation import knn
from iwm.report.markup import section, table
from iwm.report.run_folder import Run


def nearest_neighbours(run: Run) -> str:
    """Accuracy of a vote among the nearest training images."""
    parts = []
    for result in run.of_protocol("knn").values():
        ks = list(next(iter(result["accuracy"].values())))
        rows = []
        for context, scores in result["accuracy"].items():
            cells = (
                f"<td><b>{100 * s['mean']:.1f}</b> ± {100 * s['standard_error']:.1f}</td>" for s in scores.values()
            )
            rows.append(f"<td>{escape(context)}</td>{''.join(cells)}")
        parts.append(table(("encoder", *(f"k = {k}" for k in ks)), rows) + f"<p>{escape(knn.caption(result))}</p>")
    return section("Nearest neighbours, accuracy in %", "".join(parts)) if parts else ""

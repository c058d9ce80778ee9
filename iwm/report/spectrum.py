"""What a run's representation holds: similarity matrix, means of predictions, maps of patch features."""

from __future__ import annotations

from html import escape
from typing import Any

from iwm.evaluation import marginal, similarity
from iwm.report.markup import figure, section, table
from iwm.report.run_folder import Run


def similarity_matrix(run: Run) -> str:
    """How much of an augmentation the representation keeps: figure S3 and its figures."""
    parts = []
    for result in run.of_protocol("similarity").values():
        rows = [
            f"<td>{escape(words)}</td><td>{result[name]['mean']:.3f}</td><td>{_error(result[name])}</td>"
            for name, words in similarity.FIGURES.items()
        ]
        caption = (
            f"Cosine similarity of the {result['encoder']}'s pooled features, {len(result['shown'])} held-out images, "
            f"{result['augmentations']} augmented views of each (no crop). Yellow squares on the diagonal: invariant; "
            f"squares with structure: the augmentation is in the representation. The table is over {result['images']} "
            "images; the less the variance within images, the more invariant."
        )
        picture = figure(run.folder / "eval" / result["picture"], "matrix of cosine similarities", caption)
        parts.append(table(("", "mean", "standard error"), rows) + picture)
    return section("How much of an augmentation is kept", "".join(parts)) if parts else ""


def _error(score: dict[str, Any]) -> str:
    return "" if score["standard_error"] is None else f"{score['standard_error']:.3f}"


def marginalised(run: Run) -> str:
    """Means of N predictions: table S6 and figure S4."""
    parts = []
    for result in run.of_protocol("marginal").values():
        rows = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in marginal.lines(result)]
        caption = "Some jittered copies of a held-out image, and the nearest to the mean of its predictions below them."
        picture = figure(run.folder / "eval" / result["picture"], "copies and nearest neighbours", caption)
        parts.append(f"<p>{escape(marginal.caption(result))}</p>{table(marginal.head(result), rows)}{picture}")
    return section("Means of predictions", "".join(parts)) if parts else ""


def patch_maps(run: Run) -> str:
    """Principal components and attention of patches."""
    parts = []
    for result in run.of_protocol("maps").values():
        folder = run.folder / "eval"
        colours = (
            "The first three principal components of the teacher's patch features as red, green and blue; equal "
            f"colours are equal features. They hold {result['explained']:.0%} of the variance. The action: "
            f"{result['action']}."
        )
        attention = (
            "The teacher's last block: what the marked patch attends to, and how much attention each patch receives "
            "from all, in the mean and by head. 1 is an equal share."
        )
        parts.append(figure(folder / result["picture"], "maps of principal components", colours))
        parts.append(figure(folder / result["attention_picture"], "maps of attention", attention))
    return section("Patch features", "".join(parts)) if parts else ""

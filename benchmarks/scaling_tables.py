"""Sizes of images, and the form of the tables that docs/scaling.md shows."""

from __future__ import annotations

from collections.abc import Iterable

IMAGENET_BYTES = 147_897_477_120 / 1_281_167
"""Mean bytes per image: size of ILSVRC2012_img_train.tar over its number of images."""
RESIZED_BYTES = 31_075
"""Mean bytes per image made with --resize 320, measured on the benchmarks' 1,200 tiles."""


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    """Format a Markdown table; all columns but the first are right-aligned."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))

"""A figure over images, which are the independent units of every evaluation."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def over_images(values: Float[Tensor, " images"]) -> dict[str, float]:
    """`mean` and `standard_error` of a figure of each image (NaN for a single one)."""
    return {"mean": values.mean().item(), "standard_error": (values.std() / len(values) ** 0.5).item()}

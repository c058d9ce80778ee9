"""Colours of maps and matrices: viridis over a range, with the bar that explains them."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from iwm.evaluation.figures import FigureTile, ScaleBar

STRIP = 256
"""Number of colours in the bar."""


@dataclass(frozen=True)
class ColourScale:
    """Colours from `low` (dark blue) to `high` (yellow); values outside get the colour of the nearer end."""

    low: float
    high: float
    power: float = 1.0
    """Exponent of the share of the range: below 1, small values get more of the colours."""

    def colours(self, values: Float[Tensor, "h w"]) -> UInt8[Tensor, "h w 3"]:
        """Return the colours of finite values, on the CPU."""
        share = ((values.double().cpu() - self.low) / (self.high - self.low or 1.0)).clamp(0, 1) ** self.power
        return torch.from_numpy(matplotlib.colormaps["viridis"](share.numpy(), bytes=True)[..., :3].copy())

    def bar(self, label: str, count: int = 5) -> ScaleBar:
        """Return the bar with `count` numbers at equal distances along it."""
        along = torch.linspace(0, 1, STRIP)[None] ** (1 / self.power)
        strip = self.colours(self.low + (self.high - self.low) * along)
        places = torch.linspace(0, 1, count).tolist()
        ticks = [(at, f"{self.low + (self.high - self.low) * at ** (1 / self.power):.2f}") for at in places]
        alt = f"colours from dark blue, {ticks[0][1]}, to yellow, {ticks[-1][1]}"
        return ScaleBar(label, FigureTile(strip, alt, exact=True), ticks)

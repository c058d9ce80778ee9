"""A picture of mode `all`: each stage of the way that data takes, against the limit above it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from mistakes import BenchmarkError

DONE, LIMIT, INK, QUIET = "#2f6f9f", "#dde5ec", "#1f2933", "#66727f"


class Bar(NamedTuple):
    """A rate and what it could be at most, images/s. Without a limit it stands for itself."""

    name: str
    rate: float
    limit: float | None = None
    limit_name: str = ""


def bars(result: Mapping[str, Any]) -> list[Bar]:
    """Stages from the stored image to training, out of what `all` has found."""
    rate = {name: mode["images_per_second"]["median"] for name, mode in result["modes"].items()}
    peak = result["peak_flops"]["median"] * result["processes"] / sum(result["flops_per_image"].values())
    outside = {name: rates["wall"]["median"] for name, rates in result.get("pipeline_limits", {}).items()}
    decode = outside.get("JPEG decode alone")
    rivals = {name: images for name, images in outside.items() if name.startswith("torchvision")}
    fastest = max(rivals, key=lambda name: rivals[name], default=None)
    return [
        *([Bar(f"{fastest} loader", rivals[fastest], decode, "of JPEG decode")] if fastest else []),
        Bar("pipeline alone", rate["data"], decode, "of JPEG decode"),
        Bar("model alone", rate["model"], peak, "of the matrix product's FLOP/s"),
        Bar("model beside the pipeline", rate["interference"], rate["model"], "of the model alone"),
        Bar("end to end", rate["end-to-end"], min(rate["data"], rate["model"]), "of the slower of the two alone"),
    ]


def check_name(file: Path) -> None:
    """Raise BenchmarkError where a picture of that name could not be written."""
    if file.suffix not in (".png", ".svg"):
        raise BenchmarkError(f"--plot {file}: the name must end in .png or .svg")


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Write the picture as .png or .svg, after the file's name."""
    shown = bars(result)
    figure = Figure(figsize=(9, 1.3 + 0.62 * len(shown)), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for place, bar in enumerate(shown):
        if bar.limit is not None:
            axes.barh(place, bar.limit, height=0.66, color=LIMIT)
        axes.barh(place, bar.rate, height=0.4, color=DONE)
        says = f"{bar.rate:,.0f}"
        if bar.limit is not None:
            says += f"   {bar.rate / bar.limit:.0%} {bar.limit_name} ({bar.limit:,.0f})"
        end = max(bar.rate, bar.limit or 0.0)
        axes.annotate(says, (end, place), xytext=(6, 0), textcoords="offset points", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(shown)), [bar.name for bar in shown], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.75 * max(max(bar.rate, bar.limit or 0.0) for bar in shown))
    axes.set_xlabel("images per second (dark: measured, light: its limit)", color=QUIET)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIMIT)
    config, device = result["config"], result["machine"]
    axes.set_title(
        f"{result['recipe']}: two views of {config['views']['size']} px, {config['train']['precision']}, "
        f"{result['processes']} × {device['gpu'] or device['processor']}, {device['cores']} cores",
        loc="left",
        color=INK,
        fontsize=11,
    )
    figure.savefig(file)

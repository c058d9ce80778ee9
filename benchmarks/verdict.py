"""What the four rates of training say together: four ratios, and one sentence on what limits this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from turns import ratio

MEANING = {
    "end_to_end": ("end-to-end / model", "kept of the model's speed"),
    "interference": ("interference / model", "kept beside the pipeline's work"),
    "starvation": ("1 − end-to-end / interference", "lost to waiting for data"),
    "headroom": ("data / model", "the pipeline's lead, each alone"),
}
"""Of each ratio: what is divided by what, and what it says."""
NOISE = 0.05
"""A loss below this is none."""


def ratios(rates: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Turn by turn, from images/s of each turn: what `all` measures, under the names of its modes."""
    a, b, c, d = (rates[name] for name in ("data", "model", "end-to-end", "interference"))
    kept = ratio(c, d)
    return {
        "end_to_end": ratio(c, b),
        "interference": ratio(d, b),
        "starvation": {
            "median": round(1 - kept["median"], 4),
            "lowest": round(1 - kept["highest"], 4),
            "highest": round(1 - kept["lowest"], 4),
        },
        "headroom": ratio(a, b),
    }


def limit(rates: Mapping[str, float], per_cpu_second: Mapping[str, float] | None) -> str:
    """One sentence, from images/s of each mode; on a CPU also from its images per second of CPU time."""
    a, b, c, d = (rates[name] for name in ("data", "model", "end-to-end", "interference"))
    alone = f"alone the pipeline makes {a:,.0f} images/s and the model takes {b:,.0f}, end to end it is {c:,.0f}"
    if per_cpu_second is None:
        if c >= (1 - NOISE) * b:
            return f"the model: {alone}."
        if 1 - c / d >= 1 - d / b:
            return f"the pipeline: training waits for it {1 - c / d:.0%} of the time; {alone}."
        return f"both share the machine: the pipeline's work costs the model {1 - d / b:.0%} of its speed; {alone}."
    # Both use every core, so an image costs the CPU time of both; this part of it is the pipeline's.
    share = per_cpu_second["model"] / (per_cpu_second["data"] + per_cpu_second["model"])
    together = f"{alone}, where {a * b / (a + b):,.0f} would be the two by turns"
    if share <= 0.25:
        return f"the model, with {1 - share:.0%} of the cores' time: {together}."
    if share >= 0.75:
        return f"the pipeline, with {share:.0%} of the cores' time: {together}."
    return f"both share the cores, {share:.0%} of their time for the pipeline: {together}."

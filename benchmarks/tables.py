"""Tables, bottleneck analysis and plot of the training modes.

From the four rates of mode `all` follow four ratios and one sentence that names the bottleneck of the machine. The plot
shows each stage of the data path against its limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from timing import paired_ratio, ratio_text

from iwm.evaluation.result_table import ResultTable


def show_training(result: Mapping[str, Any], console: Console) -> None:
    """Print the results of the training measurements."""
    console.print(f"\n{_title(result)}", highlight=False, soft_wrap=True)
    console.print(_steps(result))
    for line in _remarks(result):
        console.print(f"· {line}", highlight=False, soft_wrap=True)
    console.print()
    if result["operators"] is not None:
        console.print(_operators(result))


def show_pipeline(result: Mapping[str, Any], console: Console) -> None:
    """Print the results of the pipeline alone."""
    console.print(_limits(result))
    console.print(_stages(result))


def show_together(result: Mapping[str, Any], console: Console) -> None:
    """Print the ratios and the bottleneck."""
    console.print(_ratios(result))
    console.print(f"[bold]Bottleneck of this machine:[/] {result['bottleneck']}\n", highlight=False, soft_wrap=True)


def _title(result: Mapping[str, Any]) -> str:
    config = result["config"]
    return (
        f"[bold]{result['recipe']}[/]{', ' + result['scenario'] if result['scenario'] else ''}: "
        f"{config['data']['global_batch_size']} images of {config['views']['size']} px per step, "
        f"{config['train']['precision']}, {'compiled' if config['train']['compile'] else 'eager'}, "
        f"on {result['processes']} × {result['device']}, "
        f"torch threads {result['torch_threads']}, pipeline threads {result['pipeline_threads']}; median (p10–p90)"
    )


def _steps(result: Mapping[str, Any]) -> ResultTable:
    rows = [
        [
            name,
            _spread(mode["images_per_second"]),
            rounded(mode["images_per_cpu_second"]["median"]),
            _spread(mode["step_ms"]),
            "" if mode["mfu"] is None else f"{mode['mfu']:.1%}",
            f"{mode['memory_gib']:.2f}",
            f"{mode['data_wait']:.1%}" if name == "end-to-end" else "",
        ]
        for name, mode in result["modes"].items()
    ]
    return ResultTable("", ["", "images/s", "per CPU second", "ms per step", "MFU", "GiB", "data wait"], rows)


def _remarks(result: Mapping[str, Any]) -> list[str]:
    flops = {name.replace("_", " "): count / 1e9 for name, count in result["flops_per_image"].items()}
    warm, modes = result["warm_up"], result["modes"]
    updates = {name: ms["median"] for name, ms in result["updates"].items()}
    compilation = " with its compilation" if result["config"]["train"]["compile"] else ""
    step = modes["model" if "model" in modes else "end-to-end"]["step_ms"]["median"]
    return [
        f"{rounded(sum(flops.values()))} GFLOP per image ({', '.join(f'{k} {rounded(v)}' for k, v in flops.items())}); "
        f"100% MFU is {rounded(result['peak_flops']['median'] / 1e12)} TFLOP/s, a matrix product in this run",
        f"not included: first step {rounded(warm['first_step_seconds'])} s{compilation}, "
        f"{result['settings']['warmup']} warm-up steps {rounded(warm['seconds'])} s in total",
        "steps measured: " + ", ".join(f"{name} {mode['steps']}" for name, mode in modes.items()),
        f"graphs compiled {result['graphs']}, recompilations after warm-up {result['recompilations']}",
        f"{', '.join(f'{name} {rounded(ms)} ms' for name, ms in updates.items())}, measured alone: "
        f"{sum(updates.values()) / step:.1%} of a step",
        f"tokens processed over tokens needed: {_ratio(*result['tokens'].values())} ("
        + ", ".join(f"{name.replace('_', ' ')} {_ratio(counts)}" for name, counts in result["tokens"].items())
        + ")",
        *(f"model over {name}, FLOPs-normalised: {ratio_text(r)}" for name, r in result["flop_for_flop"].items()),
    ]


def _ratio(*tokens: Mapping[str, float]) -> str:
    return f"{sum(part['processed'] for part in tokens) / sum(part['needed'] for part in tokens):.3f}"


def _operators(result: Mapping[str, Any]) -> ResultTable:
    rows = [
        [entry["name"], f"{entry['share']:.1%}", rounded(entry["ms_per_step"]), rounded(entry["calls_per_step"])]
        for entry in result["operators"]
    ]
    return ResultTable("", ["most expensive operators, self time", "share", "ms per step", "calls per step"], rows)


def _stages(result: Mapping[str, Any]) -> ResultTable:
    # Each value is a difference of two measurements, which for a cheap operator may be below their noise.
    rows = [
        [name, _spread(ms) if ms["p10"] > 0 else f"within the noise of {rounded(ms['p90'] - ms['p10'])}"]
        for name, ms in result["pipeline_stages"].items()
    ]
    columns = ["the pipeline's stages (on a CPU: on one core)", "ms per image, median (p10–p90)"]
    return ResultTable("", columns, rows)


def _limits(result: Mapping[str, Any]) -> ResultTable:
    rows = [[name, _spread(rates["wall"]), _spread(rates["core"])] for name, rates in result["pipeline_limits"].items()]
    return ResultTable("", ["the pipeline's limit and baselines", "images/s", "per CPU second"], rows)


def _ratios(result: Mapping[str, Any]) -> ResultTable:
    rows = [
        [f"{quotient}: {meaning}", ratio_text(result["ratios"][name])] for name, (quotient, meaning) in MEANING.items()
    ]
    return ResultTable("", ["ratios of paired turns", "median (range)"], rows)


def rounded(value: float) -> str:
    """Format with three significant digits, or with all digits before the decimal point."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"


def _spread(values: Mapping[str, float]) -> str:
    return f"{rounded(values['median'])} ({rounded(values['p10'])}–{rounded(values['p90'])})"


MEANING = {
    "end_to_end": ("end-to-end / model", "share of the model's speed that training reaches"),
    "interference": ("interference / model", "share of the model's speed while the pipeline runs"),
    "starvation": ("1 − end-to-end / interference", "share lost to waiting for data"),
    "headroom": ("data / model", "pipeline's speed over the model's, each alone"),
}
"""Formula and meaning of each ratio."""
NOISE = 0.05
"""Relative loss of speed below which there is no bottleneck in the pipeline."""


def ratios(rates: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return the ratios of paired turns, from the images/s of each turn of the modes that `all` measures."""
    a, b, c, d = (rates[name] for name in ("data", "model", "end-to-end", "interference"))
    kept = paired_ratio(c, d)
    return {
        "end_to_end": paired_ratio(c, b),
        "interference": paired_ratio(d, b),
        "starvation": {
            "median": round(1 - kept["median"], 4),
            "lowest": round(1 - kept["highest"], 4),
            "highest": round(1 - kept["lowest"], 4),
        },
        "headroom": paired_ratio(a, b),
    }


def bottleneck(rates: Mapping[str, float], per_cpu_second: Mapping[str, float] | None) -> str:
    """Return one sentence that names the bottleneck.

    rates: images/s of each mode. per_cpu_second: on a CPU also images per second of CPU time.
    """
    a, b, c, d = (rates[name] for name in ("data", "model", "end-to-end", "interference"))
    alone = f"alone the pipeline makes {a:,.0f} images/s and the model takes {b:,.0f}; end to end they reach {c:,.0f}"
    if per_cpu_second is None:
        if c >= (1 - NOISE) * b:
            return f"the model: {alone}."
        if 1 - c / d >= 1 - d / b:
            return f"the pipeline: training waits for it {1 - c / d:.0%} of the time; {alone}."
        return f"both share the machine: the pipeline's work costs the model {1 - d / b:.0%} of its speed; {alone}."
    # Both use every core, so an image costs the CPU time of both. This is the pipeline's share.
    share = per_cpu_second["model"] / (per_cpu_second["data"] + per_cpu_second["model"])
    together = f"{alone}; one after the other they would reach {a * b / (a + b):,.0f}"
    if share <= 0.25:
        return f"the model, with {1 - share:.0%} of the cores' time: {together}."
    if share >= 0.75:
        return f"the pipeline, with {share:.0%} of the cores' time: {together}."
    return f"both share the cores, {share:.0%} of their time for the pipeline: {together}."


DONE, LIMIT, INK, QUIET = "#2f6f9f", "#dde5ec", "#1f2933", "#66727f"


class RateBar(NamedTuple):
    """Bar of a rate and its limit (images/s); None: no limit."""

    name: str
    rate: float
    limit: float | None = None
    limit_name: str = ""


def bars(result: Mapping[str, Any]) -> list[RateBar]:
    """Return the bars of the stages from the stored image to training, from the results of `all`."""
    rate = {name: mode["images_per_second"]["median"] for name, mode in result["modes"].items()}
    peak = result["peak_flops"]["median"] * result["processes"] / sum(result["flops_per_image"].values())
    outside = {name: rates["wall"]["median"] for name, rates in result.get("pipeline_limits", {}).items()}
    decode = outside.get("JPEG decode alone")
    rivals = {name: images for name, images in outside.items() if name.startswith("torchvision")}
    fastest = max(rivals, key=lambda name: rivals[name], default=None)
    return [
        *([RateBar(f"{fastest} loader", rivals[fastest], decode, "of JPEG decode")] if fastest else []),
        RateBar("pipeline alone", rate["data"], decode, "of JPEG decode"),
        RateBar("model alone", rate["model"], peak, "of the matrix product's FLOP/s"),
        RateBar("model while the pipeline runs", rate["interference"], rate["model"], "of the model alone"),
        RateBar("end to end", rate["end-to-end"], min(rate["data"], rate["model"]), "of the slower of the two alone"),
    ]


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw the plot and save it as .png or .svg."""
    shown = bars(result)
    figure = Figure(figsize=(9, 1.3 + 0.62 * len(shown)), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for place, bar in enumerate(shown):
        if bar.limit is not None:
            axes.barh(place, bar.limit, height=0.66, color=LIMIT)
        axes.barh(place, bar.rate, height=0.4, color=DONE)
        text = f"{bar.rate:,.0f}"
        if bar.limit is not None:
            text += f"   {bar.rate / bar.limit:.0%} {bar.limit_name} ({bar.limit:,.0f})"
        end = max(bar.rate, bar.limit or 0.0)
        axes.annotate(text, (end, place), xytext=(6, 0), textcoords="offset points", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(shown)), [bar.name for bar in shown], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.75 * max(max(bar.rate, bar.limit or 0.0) for bar in shown))
    axes.set_xlabel("images per second (dark: measured, light: limit)", color=QUIET)
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

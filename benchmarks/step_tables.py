"""The tables that training's modes print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from verdict import MEANING


def show_training(result: Mapping[str, Any], console: Console) -> None:
    """What was found of training itself."""
    console.print(f"\n{_title(result)}\n", highlight=False, soft_wrap=True)
    console.print(_steps(result))
    for line in _remarks(result):
        console.print(f"· {line}", highlight=False, soft_wrap=True)
    console.print()
    if result["operators"] is not None:
        console.print(_operators(result))


def show_pipeline(result: Mapping[str, Any], console: Console) -> None:
    """What was found of the pipeline by itself."""
    console.print(_limits(result))
    console.print(_stages(result))


def show_together(result: Mapping[str, Any], console: Console) -> None:
    """The ratios, and what limits the machine."""
    console.print(_ratios(result))
    console.print(f"[bold]What limits this machine:[/] {result['limit']}\n", highlight=False, soft_wrap=True)


def _title(result: Mapping[str, Any]) -> str:
    config = result["config"]
    return (
        f"[bold]{result['recipe']}[/]{', ' + result['scenario'] if result['scenario'] else ''}: "
        f"{config['data']['batch']} images of {config['views']['size']} px a step, {config['train']['precision']}, "
        f"{'compiled' if config['train']['compile'] else 'eager'}, on {result['processes']} × {result['device']}, "
        f"torch threads {result['torch_threads']}, pipeline threads {result['pipeline_threads']}; median (p10–p90)"
    )


def _table(first: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _steps(result: Mapping[str, Any]) -> Table:
    table = _table("", "images/s", "per CPU second", "ms a step", "MFU", "GiB", "wait")
    for name, mode in result["modes"].items():
        table.add_row(
            name,
            _spread(mode["images_per_second"]),
            _number(mode["images_per_cpu_second"]["median"]),
            _spread(mode["step_ms"]),
            "" if mode["mfu"] is None else f"{mode['mfu']:.1%}",
            f"{mode['memory_gib']:.2f}",
            f"{mode['data_wait']:.1%}" if name == "end-to-end" else "",
        )
    return table


def _remarks(result: Mapping[str, Any]) -> list[str]:
    flops = {name.replace("_", " "): count / 1e9 for name, count in result["flops_per_image"].items()}
    warm, modes = result["warm_up"], result["modes"]
    updates = {name: ms["median"] for name, ms in result["updates"].items()}
    compilation = " with its compilation" if result["config"]["train"]["compile"] else ""
    step = modes["model" if "model" in modes else "end-to-end"]["step_ms"]["median"]
    return [
        f"{_number(sum(flops.values()))} GFLOP per image ({', '.join(f'{k} {_number(v)}' for k, v in flops.items())}); "
        f"100% MFU is {_number(result['peak_flops']['median'] / 1e12)} TFLOP/s, a matrix product in this run",
        f"not counted: first step {_number(warm['first_step_seconds'])} s{compilation}, "
        f"{result['settings']['warmup']} steps of warm-up {_number(warm['seconds'])} s in all",
        "steps measured: " + ", ".join(f"{name} {mode['steps']}" for name, mode in modes.items()),
        f"graphs compiled {result['graphs']}, recompilations after warm-up {result['recompilations']}",
        f"{', '.join(f'{name} {_number(ms)} ms' for name, ms in updates.items())}, measured by themselves: "
        f"{sum(updates.values()) / step:.1%} of a step",
        f"tokens processed over tokens needed: {_ratio(*result['tokens'].values())} ("
        + ", ".join(f"{name.replace('_', ' ')} {_ratio(counts)}" for name, counts in result["tokens"].items())
        + ")",
        *(
            f"model over {name}, FLOP for FLOP: {r['median']:.2f} ({r['lowest']:.2f}–{r['highest']:.2f})"
            for name, r in result["flop_for_flop"].items()
        ),
    ]


def _ratio(*tokens: Mapping[str, float]) -> str:
    return f"{sum(part['processed'] for part in tokens) / sum(part['needed'] for part in tokens):.3f}"


def _operators(result: Mapping[str, Any]) -> Table:
    table = _table("most expensive operators, time of their own", "share", "ms a step", "calls a step")
    for entry in result["operators"]:
        table.add_row(
            entry["name"], f"{entry['share']:.1%}", _number(entry["ms_per_step"]), _number(entry["calls_per_step"])
        )
    return table


def _stages(result: Mapping[str, Any]) -> Table:
    table = _table("the pipeline's operators, on one core", "ms per image, median (p10–p90)")
    for name, ms in result["pipeline_stages"].items():
        # A difference of two measurements, which for a cheap operator may be less than they scatter.
        table.add_row(name, _spread(ms) if ms["p10"] > 0 else f"within the noise of {_number(ms['p90'] - ms['p10'])}")
    return table


def _limits(result: Mapping[str, Any]) -> Table:
    table = _table("the pipeline's limit and rivals", "images/s", "per CPU second")
    for name, rates in result["pipeline_limits"].items():
        table.add_row(name, _spread(rates["wall"]), _spread(rates["core"]))
    return table


def _ratios(result: Mapping[str, Any]) -> Table:
    table = _table("ratios, turn by turn", "median (range)")
    table.add_column("")
    for name, (quotient, meaning) in MEANING.items():
        r = result["ratios"][name]
        table.add_row(quotient, f"{r['median']:.2f} ({r['lowest']:.2f}–{r['highest']:.2f})", meaning)
    return table


def _number(value: float) -> str:
    """Three digits or all before the point."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"


def _spread(values: Mapping[str, float]) -> str:
    return f"{_number(values['median'])} ({_number(values['p10'])}–{_number(values['p90'])})"

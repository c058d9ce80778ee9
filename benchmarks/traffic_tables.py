"""Tables of mode `traffic`: counts of the compiled parts and of the step, then the estimate with its rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from tables import new_table, rounded

KINDS = {"pointwise": "pointwise", "attention": "attention", "gemm": "GEMM"}
"""Kinds of kernels and their names in tables."""

PASSES = {"forward": "fwd", "backward": "bwd"}

SMALL = 0.002
"""Share of a graph's bytes below which its kernels share one line."""


def show_traffic(result: Mapping[str, Any], each: bool, console: Console) -> None:
    """Print the tables. each: also every kernel."""
    console.print(f"\n{_title(result)}\n", highlight=False, soft_wrap=True)
    if each:
        for graph in result["graphs"]:
            console.print(_kernels(graph))
    console.print(_parts(result))
    console.print(_traffic(result))
    console.print(_step(result))
    console.print(_estimate(result))
    console.print(_rates(result))
    console.print()


def _title(result: Mapping[str, Any]) -> str:
    train, gpu = result["config"]["train"], result["gpu"]
    return (
        f"[bold]{result['recipe']}[/]{', ' + result['scenario'] if result['scenario'] else ''}: "
        f"{result['images']} images of {result['config']['views']['size']} px in one pass, {train['precision']}, "
        f"compiled for {gpu['name']}"
    )


def _kernels(graph: Mapping[str, Any]) -> Table:
    table = new_table(f"{graph['part']}, {graph['pass']}", "source", "read B/token", "written", "GFLOP")
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    tokens, kernels = graph["tokens"], graph["kernels"]
    least = SMALL * sum(kernel["read"] + kernel["written"] for kernel in kernels)
    small = [kernel for kernel in kernels if kernel["read"] + kernel["written"] < least]
    for kernel in kernels:
        if kernel not in small:
            gflop = rounded(kernel["flops"] / 1e9) if kernel["flops"] else ""
            bytes_ = (rounded(kernel[way] / tokens) for way in ("read", "written"))
            table.add_row(f"{kernel['kind']} {kernel['name']}", kernel["source"], *bytes_, gflop)
    if small:
        bytes_ = (rounded(sum(kernel[way] for kernel in small) / tokens) for way in ("read", "written"))
        table.add_row(f"{len(small)} kernels of less", "", *bytes_, "")
    return table


def _parts(result: Mapping[str, Any]) -> Table:
    graphs = result["graphs"]
    backward = {graph["part"]: graph for graph in graphs if graph["pass"] == "backward"}
    table = new_table("counted: compiled part", "calls", "tokens", "saved B/token", "GFLOP")
    for graph in graphs:
        if graph["pass"] == "forward":
            passes = [graph, *([backward[graph["part"]]] if graph["part"] in backward else [])]
            flops = sum(one[kind]["flops"] for one in passes for kind in KINDS)
            saved = f"{graph['saved_bytes'] / graph['tokens']:,.0f}" if len(passes) > 1 else ""
            flop = rounded(flops / 1e9) if flops else ""
            table.add_row(graph["part"], str(graph["calls"]), f"{graph['tokens']:,}", saved, flop)
    return table


def _traffic(result: Mapping[str, Any]) -> Table:
    table = new_table("counted: KiB per token", "", "kernels", *(KINDS[kind] for kind in KINDS))
    for graph in result["graphs"]:
        sizes = [graph[kind]["bytes"] / graph["tokens"] / 1024 for kind in KINDS]
        cells = (f"{size:.2f}" if size else "" for size in sizes)
        number = sum(graph[kind]["kernels"] for kind in KINDS)
        table.add_row(graph["part"], PASSES[graph["pass"]], str(number), *cells)
    return table


def _step(result: Mapping[str, Any]) -> Table:
    """Return the counts of the whole step."""
    table = new_table("counted: whole step", "kernels", "GB", "TFLOP")
    for kind in KINDS:
        total = {
            name: sum(graph["calls"] * graph[kind][name] for graph in result["graphs"])
            for name in ("kernels", "bytes", "flops")
        }
        table.add_row(
            f"{KINDS[kind]}, compiled",
            f"{total['kernels']:,}",
            rounded(total["bytes"] / 1e9),
            rounded(total["flops"] / 1e12) if total["flops"] else "",
        )
    for name, outside in result["outside"].items():
        size = sum(kernel["read"] + kernel["written"] for kernel in outside)
        table.add_row(name, f"{len(outside):,}", rounded(size / 1e9), "")
    if not result["config"]["train"]["activation_checkpointing"]:
        found = result["memory"]
        table.add_row("saved for the backward pass", "", rounded(found["saved"] / 1e9), "")
        table.add_row("parameters, gradients, moments, target encoder", "", rounded(found["state"] / 1e9), "")
        table.add_row("memory, at least", "", rounded(sum(found.values()) / 1e9), "")
    return table


def _estimate(result: Mapping[str, Any]) -> Table:
    found = result["estimate"]
    table = new_table("estimated from the counts and the rates below", "ms", "share")
    for name, ms in found["ms"].items():
        table.add_row(KINDS.get(name, name), rounded(ms), f"{ms / found['step_ms']:.1%}")
    table.add_row("step", rounded(found["step_ms"]), "", end_section=True)
    table.add_row("images/s", rounded(found["images_per_second"]), "")
    table.add_row("MFU", f"{found['mfu']:.1%}", "")
    return table


def _rates(result: Mapping[str, Any]) -> Table:
    names = {
        "gemm_tflops": "matrix products (--gemm-tflops)",
        "attention_tflops": "attention (--attention-tflops)",
        "bandwidth": "memory (--bandwidth)",
        "peak_tflops": "100% MFU (--peak-tflops)",
        "gap_us": "gap after each kernel (--gap-us)",
    }
    table = new_table("rate", "", "")
    for name, rate in result["rates"].items():
        table.add_row(names[name], f"{rounded(rate['value'])} {rate['unit']}", rate["source"])
    return table

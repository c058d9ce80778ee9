"""Tables of mode `traffic`: counts of the compiled parts and of the step, then the estimate with its rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from tables import rounded

from iwm.evaluation.result_table import ResultTable

KINDS = {"pointwise": "pointwise", "attention": "attention", "gemm": "GEMM"}
"""Kinds of kernels and their names in tables."""

PASSES = {"forward": "fwd", "backward": "bwd"}

SMALL = 0.002
"""Share of a graph's bytes below which its kernels share one line."""


def show_traffic(result: Mapping[str, Any], each: bool, console: Console) -> None:
    """Print the tables. each: also every kernel."""
    console.print(f"\n{_title(result)}", highlight=False, soft_wrap=True)
    if each:
        for graph in result["graphs"]:
            console.print(_kernels(graph))
    console.print(_parts(result))
    console.print(_traffic(result))
    console.print(_step(result))
    if not result["config"]["train"]["activation_checkpointing"]:  # what it recomputes is not subtracted
        console.print(_memory(result))
    console.print(_estimate(result))
    console.print(_rates(result))


def _title(result: Mapping[str, Any]) -> str:
    train, gpu = result["config"]["train"], result["gpu"]
    return (
        f"[bold]{result['recipe']}[/]{', ' + result['scenario'] if result['scenario'] else ''}: "
        f"{result['images']} images of {result['config']['views']['size']} px in one pass, {train['precision']}, "
        f"compiled for {gpu['name']}"
    )


def _kernels(graph: Mapping[str, Any]) -> ResultTable:
    tokens, kernels = graph["tokens"], graph["kernels"]
    least = SMALL * sum(kernel["read"] + kernel["written"] for kernel in kernels)
    small = [kernel for kernel in kernels if kernel["read"] + kernel["written"] < least]
    rows = []
    for kernel in kernels:
        if kernel not in small:
            gflop = rounded(kernel["flops"] / 1e9) if kernel["flops"] else ""
            bytes_ = (rounded(kernel[way] / tokens) for way in ("read", "written"))
            rows.append([f"{kernel['kind']} {kernel['name']}", kernel["source"], *bytes_, gflop])
    if small:
        bytes_ = (rounded(sum(kernel[way] for kernel in small) / tokens) for way in ("read", "written"))
        rows.append([f"{len(small)} kernels of less", "", *bytes_, ""])
    columns = [f"{graph['part']}, {graph['pass']}", "source", "read B/token", "written", "GFLOP"]
    return ResultTable("", columns, rows)


def _parts(result: Mapping[str, Any]) -> ResultTable:
    graphs = result["graphs"]
    backward = {graph["part"]: graph for graph in graphs if graph["pass"] == "backward"}
    rows = []
    for graph in graphs:
        if graph["pass"] == "forward":
            passes = [graph, *([backward[graph["part"]]] if graph["part"] in backward else [])]
            flops = sum(one[kind]["flops"] for one in passes for kind in KINDS)
            saved = f"{graph['saved_bytes'] / graph['tokens']:,.0f}" if len(passes) > 1 else ""
            flop = rounded(flops / 1e9) if flops else ""
            rows.append([graph["part"], str(graph["calls"]), f"{graph['tokens']:,}", saved, flop])
    return ResultTable("", ["counted: compiled part", "calls", "tokens", "saved B/token", "GFLOP"], rows)


def _traffic(result: Mapping[str, Any]) -> ResultTable:
    rows = []
    for graph in result["graphs"]:
        sizes = [graph[kind]["bytes"] / graph["tokens"] / 1024 for kind in KINDS]
        cells = (f"{size:.2f}" if size else "" for size in sizes)
        number = sum(graph[kind]["kernels"] for kind in KINDS)
        rows.append([f"{graph['part']} {PASSES[graph['pass']]}", str(number), *cells])
    return ResultTable("", ["counted: KiB per token", "kernels", *KINDS.values()], rows)


def _step(result: Mapping[str, Any]) -> ResultTable:
    """Return the counts of the whole step."""
    rows = []
    for kind in KINDS:
        total = {
            name: sum(graph["calls"] * graph[kind][name] for graph in result["graphs"])
            for name in ("kernels", "bytes", "flops")
        }
        flop = rounded(total["flops"] / 1e12) if total["flops"] else ""
        rows.append([f"{KINDS[kind]}, compiled", f"{total['kernels']:,}", rounded(total["bytes"] / 1e9), flop])
    for name, outside in result["outside"].items():
        size = sum(kernel["read"] + kernel["written"] for kernel in outside)
        rows.append([name, f"{len(outside):,}", rounded(size / 1e9), ""])
    return ResultTable("", ["counted: whole step", "kernels", "GB", "TFLOP"], rows)


def _memory(result: Mapping[str, Any]) -> ResultTable:
    """Return the least memory of the step, as in docs/recipes.md."""
    found, images = result["memory"], result["images"]
    rows = [
        ["saved for the backward pass", rounded(found["saved"] / 2**30), rounded(found["saved"] / images / 2**20)],
        ["parameters, gradients, moments, target encoder", rounded(found["state"] / 2**30), ""],
        ["sum", rounded(sum(found.values()) / 2**30), ""],
    ]
    return ResultTable("", ["counted: memory, at least", "GiB", "MiB per image"], rows)


def _estimate(result: Mapping[str, Any]) -> ResultTable:
    found = result["estimate"]
    rows = [
        *([KINDS.get(name, name), rounded(ms), f"{ms / found['step_ms']:.1%}"] for name, ms in found["ms"].items()),
        ["step", rounded(found["step_ms"]), ""],
        ["images/s", rounded(found["images_per_second"]), ""],
        ["MFU", f"{found['mfu']:.1%}", ""],
    ]
    return ResultTable("", ["estimated from the counts and the rates below", "ms", "share"], rows)


def _rates(result: Mapping[str, Any]) -> ResultTable:
    names = {
        "gemm_tflops": "matrix products (--gemm-tflops)",
        "attention_tflops": "attention (--attention-tflops)",
        "bandwidth": "memory (--bandwidth)",
        "peak_tflops": "100% MFU (--peak-tflops)",
        "gap_us": "gap after each kernel (--gap-us)",
    }
    rows = [
        [names[name], f"{rounded(rate['value'])} {rate['unit']}", rate["source"]]
        for name, rate in result["rates"].items()
    ]
    return ResultTable("", ["rate", "value", "source"], rows)

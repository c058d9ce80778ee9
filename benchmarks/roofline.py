"""Roofline estimate of a step: each kernel takes as long as its arithmetic or its memory traffic, the longer of both.

After each kernel there is a gap. The estimate leaves out what counts do not show: slow kernels, tails, and traffic of a
cache that is too small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from kernel_traffic import Kernel, Kind
from kernels import milliseconds, step_rate
from options import TrafficOptions
from traced_step import TracedStep

from iwm.models.flops import measure_matmul_flops


class GpuRate(NamedTuple):
    """Assumption or measurement of a GPU."""

    value: float
    unit: str
    source: Literal["given", "measured", "assumed"]


ASSUMED = {
    "gemm_tflops": GpuRate(660.0, "TFLOP/s", "assumed"),
    "attention_tflops": GpuRate(120.0, "TFLOP/s", "assumed"),
    "bandwidth": GpuRate(2.9, "TB/s", "assumed"),
    "peak_tflops": GpuRate(784.0, "TFLOP/s", "assumed"),
    "gap_us": GpuRate(3.5, "µs", "assumed"),
}
"""Rates in bf16, by their options, from an H100 (benchmarks/results/h100-2026-11-26): those of a step's matrix products
and attention kernels, averaged over their time (B/16 recipe, 256 images), of a copy, and of a product of two 8192²
matrices. The gap is that of a CUDA graph: the idle time and the memsets of a step (3.8 ms), over its counted kernels
(benchmarks/results/h100-2026-11-26-b)."""


def choose_rates(options: TrafficOptions) -> dict[str, GpuRate]:
    """Return each rate as given, else as measured on this machine's GPU, else as assumed."""
    rates = {}
    for name, assumed in ASSUMED.items():
        given = getattr(options, name)
        if given is not None:
            rates[name] = assumed._replace(value=given, source="given")
        elif torch.cuda.is_available() and name != "gap_us":
            rates[name] = assumed._replace(value=_measured(name, options.config.train.precision), source="measured")
        else:
            rates[name] = assumed
    return rates


def _measured(name: str, precision: str) -> float:
    """Measure a rate on the GPU: a copy of 1 GiB, a large matrix product, or what benchmarks/kernels.py times."""
    gpu = torch.device("cuda")
    if name == "bandwidth":
        source, target = (torch.empty(2**30, dtype=torch.uint8, device=gpu) for _ in range(2))
        return 2 * 2**30 / (1e9 * milliseconds(target.copy_, source))
    if name == "peak_tflops":
        return measure_matmul_flops(gpu, precision) / 1e12
    return step_rate("products" if name == "gemm_tflops" else "attention")


def estimate(step: TracedStep, images: int, needed: float, rates: Mapping[str, GpuRate]) -> dict[str, Any]:
    """Return the estimated milliseconds of each kind of kernel and phase, images/s and MFU.

    needed: FLOPs per image that training requires (iwm/models/flops.py); MFU counts these alone.
    """
    compiled = [kernel for graph in step.graphs for kernel in graph.kernels * graph.calls.total()]
    kinds = {kind: [kernel for kernel in compiled if kernel.kind == kind] for kind in get_args(Kind)}
    groups = {**kinds, **step.eager}
    ms = {name: 1e3 * seconds(kernels, rates) for name, kernels in groups.items()}
    ms["gaps"] = 1e-3 * rates["gap_us"].value * sum(len(kernels) for kernels in groups.values())
    rate = 1e3 * images / sum(ms.values())
    mfu = rate * needed / (1e12 * rates["peak_tflops"].value)
    return {"ms": ms, "step_ms": sum(ms.values()), "images_per_second": rate, "mfu": mfu}


def seconds(kernels: Iterable[Kernel], rates: Mapping[str, GpuRate]) -> float:
    """Return the time of kernels, one after another, without gaps."""
    bandwidth = 1e12 * rates["bandwidth"].value
    speed = {kind: 1e12 * rates[f"{kind}_tflops"].value for kind in ("gemm", "attention")} | {"pointwise": float("inf")}
    return sum(max(kernel.flops / speed[kernel.kind], kernel.bytes / bandwidth) for kernel in kernels)

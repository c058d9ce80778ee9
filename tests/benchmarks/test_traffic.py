"""Counts of mode `traffic`: known graphs exactly, the B/16 step against a table, and the arithmetic of its estimate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import kernels
import pytest
import torch
import traffic
from environment import BenchmarkError
from fake_gpu import GPU, GpuProperties, presented_gpu
from kernel_traffic import Kernel, _attention_flops
from kernels import step_rate
from options import traffic_options
from python_autograd import python_engine
from rich.console import Console
from roofline import ASSUMED, choose_rates, estimate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from traced_step import Graph, StepRecorder, TracedStep, collapsed
from traffic import check_can_trace, in_own_process, summary, trace_step

from iwm.recipes import RECIPES, demo

RELEASE = ".".join(torch.__version__.split(".")[:2])

COUNTED = ("kernels", "pointwise KiB/token", "saved B/token")

COUNTS: dict[tuple[str, str], tuple[int, float, int]] = {
    ("target_encoder.embed", "forward"): (5, 5.33, 0),
    ("target_encoder.blocks.0-10", "forward"): (9, 25.5, 0),
    ("target_encoder.blocks.11", "forward"): (9, 28.54, 0),
    ("target_encoder.norm", "forward"): (1, 4.5, 0),
    ("normalize_features", "forward"): (1, 6.0, 0),
    ("encoder.embed", "forward"): (5, 5.42, 1536),
    ("encoder.blocks.0-11", "forward"): (9, 25.52, 24640),
    ("encoder.norm", "forward"): (1, 4.51, 1544),
    ("predictor.build_sequence", "forward"): (21, 7.09, 3167),
    ("predictor.blocks.0-16", "forward"): (9, 12.77, 12352),
    ("predictor.blocks.17", "forward"): (9, 14.29, 17060),
    ("predictor.project", "forward"): (4, 1.58, 1568),
    ("loss", "forward"): (3, 4.51, 4612),
    ("loss", "backward"): (1, 6.0, 0),
    ("predictor.project", "backward"): (8, 3.92, 0),
    ("predictor.blocks.0-16", "backward"): (20, 15.13, 0),
    ("predictor.blocks.17", "backward"): (22, 22.8, 0),
    ("predictor.build_sequence", "backward"): (29, 12.07, 0),
    ("encoder.norm", "backward"): (3, 6.1, 0),
    ("encoder.blocks.0-11", "backward"): (19, 30.36, 0),
    ("encoder.embed", "backward"): (4, 1.68, 0),
}
"""Counts by part and pass. A change that is meant to lower a count edits it here."""

COUNTED_RELEASES = ("2.11", "2.14", "2.15")
"""Releases of torch whose compiler was found to make these kernels."""


@pytest.fixture(scope="module")
def step() -> TracedStep:
    """The step of the B/16 recipe with 256 images on an H100."""
    return in_own_process(trace_step, RECIPES["iwm_b16_equi_18x384"](), 256, GpuProperties())


def test_the_b16_step_has_the_kernels_and_bytes_of_the_table(step: TracedStep) -> None:
    if RELEASE not in COUNTED_RELEASES:
        pytest.skip(f"the table is of torch {', '.join(COUNTED_RELEASES)}; this is torch {RELEASE}")
    found = {
        (part["part"], part["pass"]): (
            sum(part[kind]["kernels"] for kind in ("gemm", "attention", "pointwise")),
            round(part["pointwise"]["bytes"] / part["tokens"] / 1024, 2),
            round(part["saved_bytes"] / part["tokens"]),
        )
        for part in map(summary, step.graphs)
    }
    expected = COUNTS
    changes = [
        f"{', '.join(key)}: {what} {now} instead of {then} ({now - then:+.2f})"
        for key in sorted(found.keys() & expected.keys())
        for what, now, then in zip(COUNTED, found[key], expected[key], strict=True)
        if now != then
    ]
    changes += [f"{', '.join(key)}: new, {found[key]}" for key in sorted(found.keys() - expected.keys())]
    changes += [f"{', '.join(key)}: gone" for key in sorted(expected.keys() - found.keys())]
    assert not changes, "\n".join(["the traffic of the step changed; edit COUNTS if that was intended", *changes])


def test_the_b16_step_has_the_calls_and_products_of_its_blocks(step: TracedStep) -> None:
    parts = {(graph.name, graph.backward): graph for graph in step.graphs}
    for name, backward, calls, tokens, width in (
        ("target_encoder.blocks.0-10", False, 11, 256 * 196, 768),
        ("encoder.blocks.0-11", False, 12, 26_992, 768),
        ("encoder.blocks.0-11", True, 12, 26_992, 768),
        ("predictor.blocks.0-16", False, 17, 256 * 196, 384),
        ("predictor.blocks.0-16", True, 17, 256 * 196, 384),
    ):
        graph = parts[name, backward]
        assert (graph.calls.total(), graph.tokens) == (calls, tokens)
        products = sum(kernel.flops for kernel in graph.kernels if kernel.kind == "gemm")
        assert products == (2 if backward else 1) * 2 * 12 * width**2 * tokens
    attention = {
        (name, backward): [kernel.name for kernel in graph.kernels if kernel.kind == "attention"]
        for (name, backward), graph in parts.items()
        if ".blocks." in name
    }
    assert attention == {
        ("target_encoder.blocks.0-10", False): ["aten._scaled_dot_product_cudnn_attention"],
        ("target_encoder.blocks.11", False): ["aten._scaled_dot_product_cudnn_attention"],
        ("encoder.blocks.0-11", False): ["iwm.short_attention"],
        ("encoder.blocks.0-11", True): ["iwm.short_attention_backward"],
        ("predictor.blocks.0-16", False): ["iwm.short_attention"],
        ("predictor.blocks.0-16", True): ["iwm.short_attention_backward"],
        ("predictor.blocks.17", False): ["iwm.short_attention"],
        ("predictor.blocks.17", True): ["iwm.short_attention_backward"],
    }
    dense = next(k for k in parts["target_encoder.blocks.0-10", False].kernels if k.kind == "attention")
    assert dense.flops == 4 * 256 * 196**2 * 768


def test_a_memory_budget_recomputes_cheap_kernels_alone() -> None:
    """Save a third less per token; products and attention stay those of a step that recomputes nothing."""
    config = RECIPES["iwm_b16_equi_18x384"]()
    config = replace(
        config,
        encoder=replace(config.encoder, depth=2),
        predictor=replace(config.predictor, depth=2),
        train=replace(config.train, activation_memory_budget=0.7),
    )
    step = in_own_process(trace_step, config, 64, GpuProperties())
    parts = {(part["part"], part["pass"]): part for part in map(summary, step.graphs)}
    for name, most in (("encoder.blocks.0-1", 18_000), ("predictor.blocks.0", 9_000)):
        forward, backward = parts[name, "forward"], parts[name, "backward"]
        assert forward["saved_bytes"] / forward["tokens"] < most
        assert [backward[kind]["kernels"] for kind in ("gemm", "attention")] == [8, 1]
        recomputed = [kernel["name"] for kernel in backward["kernels"] if "exp2" in kernel["name"]]
        assert len(recomputed) == 1, "GELU"


def test_optimiser_and_ema_move_the_bytes_of_their_tensors(step: TracedStep) -> None:
    model = 118_000_000
    trained, averaged = (sum(kernel.bytes for kernel in step.eager[name]) for name in ("optimiser", "EMA"))
    assert trained == pytest.approx(28 * model, rel=0.2)  # parameter, gradient and two moments, three of them written
    assert averaged == pytest.approx(12 * 86_000_000, rel=0.01)


def test_the_mode_returns_json_and_takes_given_rates(step: TracedStep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "in_own_process", lambda *_: step)
    options = replace(traffic_options([]), bandwidth=1.45, gap_us=0.0)
    console = Console(width=80, record=True, quiet=False)
    result = json.loads(json.dumps(traffic.run(options, console)))
    # torch reserved 21.96 GiB for this step on an H100 (benchmarks/results/h100-2026-11-26-b).
    assert 0.9 < sum(result["memory"].values()) / (21.96 * 2**30) < 1
    assert result["rates"]["bandwidth"] == {"value": 1.45, "unit": "TB/s", "source": "given"}
    assert result["rates"]["gemm_tflops"]["source"] == "assumed"
    words = console.export_text().split()
    assert {"encoder.blocks.0-11", "iwm.gelu_backward_bias"} <= set(words)
    assert {f"{sum(result['memory'].values()) / 2**30:.1f}", f"{result['memory']['saved'] / 2**28:.1f}"} <= set(words)
    halved = estimate(step, 256, 1.0, choose_rates(replace(options, bandwidth=2.9)))
    assert result["estimate"]["ms"]["pointwise"] == pytest.approx(2 * halved["ms"]["pointwise"])
    assert result["estimate"]["ms"]["gaps"] == 0.0


class Known(nn.Module):
    """Graphs whose traffic is known."""

    def add(self, x: Tensor) -> Tensor:
        return x + 1

    def gather(self, x: Tensor, index: Tensor) -> Tensor:
        return 2 * x[index]

    def halves(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // 2] + 1

    def normalise(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:])

    def square(self, x: Tensor) -> Tensor:
        return (x.exp() @ x.exp().t()).sin().sum()


TOKENS, WIDTH, TAKEN = 4096, 512, 1024


def trace_known() -> TracedStep:
    """Trace each method of Known on [TOKENS, WIDTH] in bf16, the last one with its backward pass."""
    recorder = StepRecorder({})
    with presented_gpu(GpuProperties()), recorder, recorder.compiling():
        model = Known()
        for name in ("add", "gather", "halves", "normalise", "square"):
            setattr(model, name, torch.compile(getattr(model, name), dynamic=False))
        recorder.know(model)
        x = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, device=GPU)
        index = torch.empty(TAKEN, dtype=torch.int64, device=GPU)
        with recorder.phase("outside"):
            for result in (model.add(x), model.gather(x, index), model.halves(x), model.normalise(x)):
                result.view(-1).neg()
        model.square(x.requires_grad_()).backward()
    return recorder.step


def test_known_graphs_count_what_they_must() -> None:
    step = in_own_process(trace_known)
    graphs = {(graph.name, graph.backward): graph for graph in step.graphs}
    whole, taken = 2 * TOKENS * WIDTH, 2 * TAKEN * WIDTH

    def traffic_of(name: str) -> list[tuple[str, int, int]]:
        graph = graphs[name, False]
        assert graph.calls == {name: 1}
        return [(kernel.source, kernel.read, kernel.written) for kernel in graph.kernels]

    assert traffic_of("add") == [("triton", whole, whole)]
    assert traffic_of("gather") == [("triton", taken + 8 * TAKEN, taken)]
    assert traffic_of("halves") == [("triton", whole // 2, whole // 2)]
    assert traffic_of("normalise") == [("triton", whole, whole)]
    assert [graphs[name, False].tokens for name in ("add", "gather")] == [TOKENS, TAKEN]

    exponential, product, sine = graphs["square", False].kernels[:3]
    square = 2 * TOKENS**2
    assert (exponential.kind, exponential.bytes) == ("pointwise", 2 * whole)
    assert (product.kind, product.flops, product.written) == ("gemm", 2 * TOKENS**2 * WIDTH, square)
    assert (sine.kind, sine.read) == ("pointwise", square)
    assert graphs["square", True].calls == {"square": 1}
    assert {tensor.bytes for tensor in graphs["square", False].saved} == {whole, square}

    outside = [(kernel.name, kernel.read, kernel.written) for kernel in step.eager["outside"]]
    assert outside == [("aten.neg", size, size) for size in (whole, taken, whole // 2, whole)]


class Scaled(torch.autograd.Function):
    """Two outputs, one of three inputs not a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y)
        ctx.factor = factor
        return x * factor, y.exp()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        (y,) = ctx.saved_tensors
        return gradients[0] * ctx.factor, None, gradients[1] * y.exp()


@pytest.mark.parametrize("second", [True, False])
def test_the_engine_in_python_computes_the_gradients_of_torchs(second: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8))
    x = torch.randn(4, 8, requires_grad=True)

    def loss() -> Tensor:
        hidden = checkpoint(layers, layers(x), use_reentrant=False)
        scaled, other = Scaled.apply(hidden, 3.0, x)
        mixed = scaled + hidden.t()[:4, :4].sum().double().float()
        return (mixed.square().sum() + other.mean()) if second else mixed.square().sum()

    def gradients() -> list[Tensor]:
        leaves = [*layers.parameters(), x]
        asked = torch.autograd.grad(loss(), leaves)
        for leaf in leaves:
            leaf.grad = None
        for _ in range(2):
            loss().backward()
        return [*asked, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    expected = gradients()
    with python_engine():
        found = gradients()
    assert len(found) == len(expected) == 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_the_estimate_takes_the_longer_of_arithmetic_and_memory() -> None:
    rates = {
        name: ASSUMED[name]._replace(value=value) for name, value in zip(ASSUMED, (100, 10, 2, 200, 5), strict=True)
    }
    product = Kernel("gemm", "library", "aten.mm", 10**9, 10**9, 4 * 10**11)  # 4 ms of arithmetic, 1 ms of memory
    thin = Kernel("gemm", "library", "aten.mm", 3 * 10**9, 10**9, 10**9)  # 0.01 ms of arithmetic, 2 ms of memory
    attention = Kernel("attention", "custom", "iwm.short_attention", 10, 10, 3 * 10**10)  # 3 ms
    copy = Kernel("pointwise", "triton", "add", 10**9, 10**9)  # 1 ms
    calls = {"blocks.0": 1, "blocks.1": 1}
    graph = Graph(False, [product, thin, attention, copy])
    graph.calls.update(calls)
    step = TracedStep([graph], {"EMA": [copy]})
    found = estimate(step, 64, 1e10, rates)
    gaps = 9 * 5e-3
    assert found["ms"] == pytest.approx({"gemm": 12, "attention": 6, "pointwise": 2, "EMA": 1, "gaps": gaps})
    assert found["images_per_second"] == pytest.approx(64e3 / (21 + gaps))
    assert found["mfu"] == pytest.approx(found["images_per_second"] * 1e10 / 200e12)


def test_rates_of_a_step_weigh_kernels_by_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    product = {"rows": 10, "inputs": 100, "outputs": 1000}  # 2 MFLOP a call
    lines: dict[str, Callable[..., Any]] = {
        "products": lambda options: [
            {"part": "target", **product, "tflops forward": 600},
            {"part": "predictor", **product, "tflops forward": 300, "tflops of x": 300},
            {"square": 8192, "tflops": 784},
        ],
        "attention": lambda options: [
            {"attention": "target", "kernel": kernel, "pairs": 10**7, "us forward": 100, "us backward": 1}
            for kernel in ("cudnn", "flash", "triton")
        ],
    }
    monkeypatch.setattr(kernels, "MEASURES", lines)
    assert step_rate("products") == pytest.approx((12 + 36) / (12 / 600 + 36 / 300))
    assert step_rate("attention") == pytest.approx(4 * 10**7 * 12 * 64 / 100e-6 / 1e12)


def test_equal_names_collapse_to_ranges() -> None:
    names = [*(f"encoder.blocks.{number}" for number in (0, 1, 2, 4)), "encoder.norm", "loss"]
    assert collapsed(names) == "encoder.blocks.0-2,4, encoder.norm, loss"


def test_an_attention_operator_of_unknown_flops_is_an_error() -> None:
    node = SimpleNamespace(target=SimpleNamespace(_schema=SimpleNamespace(arguments=[])), args=(), kwargs={})
    with pytest.raises(BenchmarkError, match=r"operator new\.attention: its FLOPs are not known"):
        _attention_flops("new.attention", node, {})


def test_an_uncompiled_recipe_is_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"--train.no-compile: only compiled steps can be counted"):
        check_can_trace(demo())

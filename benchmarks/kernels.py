"""Kernel benchmark: times of the training step's kernels on a GPU, compared with torch's.

python benchmarks/kernels.py [products] [attention] [mlp] [norm] [--tilings] [--json FILE]

products: matrix products of the B/16 recipe, forward and gradients (TFLOP/s). attention: short_attention, compared with
cuDNN, flash and variable-length attention. mlp: GELU forward, and its gradient with that of the bias. norm: gradients
of a norm, the residual stream and a bias. Each time is the median of 50 calls, all launched before the first one
starts, so that launch overhead is not included. The backward passes of torch's attention include building one buffer of
the gradients of queries, keys and values.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from environment import BenchmarkError, check_writable
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from iwm.kernels import mlp, residual_norm
from iwm.kernels.bf16_weights import weight_gradient
from iwm.kernels.gelu import gelu, slope
from iwm.kernels.mlp import MlpTiling, gelu_backward_bias
from iwm.kernels.residual_norm import NormTiling, residual_norm_backward
from iwm.kernels.short_attention import TILINGS, AttentionTiling, attend, attend_backward
from shards.command_line import run_command

IMAGES, PATCHES, HEADS = 256, 196, 12
CONTEXT, WHOLE = 26_992, IMAGES * PATCHES
"""Number of tokens in the context encoder's buffer, and in the target encoder and the predictor."""
PARTS = (("context", CONTEXT, 768), ("target", WHOLE, 768), ("predictor", WHOLE, 384))
BLOCKS = {"context": 12, "target": 12, "predictor": 18}
"""Number of blocks of each part."""
SHAPES = {"predictor": (32, False), "target": (64, False), "context": (64, True)}
"""Head dimension of each part, and True where its sequences are packed."""
OTHERS: dict[str, tuple[AttentionTiling, ...]] = {
    "predictor": (
        AttentionTiling(32, 128, 16, 4, 2),
        AttentionTiling(32, 128, 16, 4, 4),
        AttentionTiling(64, 64, 16, 4, 1, 168),
    ),
    "context": (AttentionTiling(32, 64, 16, 4, 1, 168),),
}
"""Backward tilings to compare with the default."""
OTHER_NORM = (
    NormTiling(4096, 16, 2, 132),
    NormTiling(4096, 16, 4, 132),
    NormTiling(2048, 8, 3, 132 * 2),
    NormTiling(2048, 8, 4, 132 * 2),
    NormTiling(1024, 4, 4, 132 * 4),
)
OTHER_MLP = (MlpTiling(4, 256, 4, 1, 132 * 32), MlpTiling(8, 256, 4, 1, 132 * 32), MlpTiling(16, 128, 4, 3, 132 * 8))

Row = dict[str, Any]
What = Literal["products", "attention", "mlp", "norm"]


@dataclass(frozen=True)
class KernelsOptions:
    """Times of the training step's kernels."""

    what: Annotated[tuple[What, ...], tyro.conf.Positional] = ("products", "attention", "mlp", "norm")
    """Kernels to time; default: all groups."""
    tilings: bool = False
    """Also measure tilings other than the default."""
    json: Path | None = None
    """File for all results (JSON)."""


def milliseconds(function: Callable[..., object], *arguments: object, repeats: int = 50) -> float:
    """Return the median time of a call on the GPU (milliseconds)."""
    call = partial(function, *arguments)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    host = time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(int((host * repeats * 1.5 + 0.002) * 2e9))  # GPU cycles in which the host enqueues all calls
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(one.elapsed_time(other) for one, other in pairwise(events))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def products(options: KernelsOptions) -> Iterator[Row]:
    """Yield the TFLOP/s of every matrix product of a block, by part; that of the weight's gradient also in bf16."""
    for part, rows, width in PARTS:
        for name, inputs, outputs in (
            ("qkv", width, 3 * width), ("proj", width, width), ("fc1", width, 4 * width), ("fc2", 4 * width, width),
        ):  # fmt: skip
            x, grad = normal(rows, inputs), normal(rows, outputs)
            weight, bias = normal(outputs, inputs), normal(outputs)
            ms = {"forward": milliseconds(torch.addmm, bias, x, weight.t())}
            if part != "target":
                ms |= {
                    "of x": milliseconds(torch.mm, grad, weight),
                    "of weight": milliseconds(weight_gradient, grad, x, torch.float32),
                    "of weight, bf16": milliseconds(torch.mm, grad.t(), x),
                }
            flops = 2e-9 * rows * inputs * outputs
            line = {"part": part, "product": name, "rows": rows, "inputs": inputs, "outputs": outputs}
            yield line | {f"tflops {which}": round(flops / took) for which, took in ms.items()}
    square = normal(8192, 8192)
    yield {"square": 8192, "tflops": round(2e-9 * 8192**3 / milliseconds(torch.mm, square, square))}


def attention(options: KernelsOptions) -> Iterator[Row]:
    """Yield the times of the forward and backward pass of each part's attention (microseconds)."""
    for part, (dim, packed) in SHAPES.items():
        lengths = [PATCHES] * IMAGES
        if packed:
            generator = torch.Generator().manual_seed(0)
            drawn = 105 + 14 * torch.randn(IMAGES, generator=generator)
            lengths = [*drawn.round().clamp(0, PATCHES).int().tolist(), *[90] * 10]
        offsets = torch.tensor([0, *lengths]).cumsum(0).int().cuda() if packed else None
        qkv, grad = normal(sum(lengths), 3 * HEADS * dim), normal(sum(lengths), HEADS * dim)
        pairs = sum(length**2 for length in lengths)
        for name, rival, backends in rivals(offsets):
            with sdpa_kernel(backends):
                leaf = qkv.detach().requires_grad_()
                out = rival(leaf)
                backward = milliseconds(partial(torch.autograd.grad, out, leaf, grad, retain_graph=True))
                with torch.no_grad():
                    forward = milliseconds(rival, qkv)
            line = {"attention": part, "kernel": name, "pairs": pairs}
            yield line | {"us forward": 1e3 * forward, "us backward": 1e3 * backward}
        out, lse = attend(qkv, HEADS, offsets, PATCHES)
        key = ("backward", "packed" if packed else "dense", dim)
        default = TILINGS[key]
        for tiling in (default, *(OTHERS.get(part, ()) if options.tilings else ())):
            TILINGS[key] = tiling
            forward = milliseconds(attend, qkv, HEADS, offsets, PATCHES)
            backward = milliseconds(attend_backward, grad, qkv, out, lse, HEADS, offsets, PATCHES)
            line = {"attention": part, "kernel": "triton", "pairs": pairs, "tiling": tiling}
            yield line | {"us forward": 1e3 * forward, "us backward": 1e3 * backward}
        TILINGS[key] = default


def rivals(offsets: Tensor | None) -> Iterator[tuple[str, Callable[[Tensor], Tensor], list[SDPBackend]]]:
    """Yield name, attention function (qkv [t, 3 · heads · dim] to [t, heads · dim]) and allowed SDPA backends."""
    if offsets is not None:

        def packed(qkv: Tensor) -> Tensor:
            q, k, v = qkv.unflatten(1, (3, HEADS, -1)).unbind(1)
            out = varlen_attn(q, k, v, offsets, offsets, PATCHES, PATCHES)
            assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are requested
            return out.flatten(1)

        yield "varlen", packed, [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
        return

    def dense(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(IMAGES, PATCHES, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(qkv), -1)

    yield "cudnn", dense, [SDPBackend.CUDNN_ATTENTION]
    yield "flash", dense, [SDPBackend.FLASH_ATTENTION]


def mlps(options: KernelsOptions) -> Iterator[Row]:
    """Yield the times of GELU, and of its gradient with that of the bias (milliseconds)."""
    exact, ours, two = (torch.compile(function, dynamic=False) for function in (F.gelu, _gelu, _apart))
    for rows, columns in ((CONTEXT, 3072), (WHOLE, 1536)):
        x, grad = normal(rows, columns), normal(rows, columns)
        shape = {"rows": rows, "columns": columns}
        yield {"gelu": "torch", **shape, "ms": milliseconds(exact, x)}
        yield {"gelu": "iwm", **shape, "ms": milliseconds(ours, x)}
        yield {"gelu backward": "two kernels", **shape, "ms": milliseconds(two, grad, x)}
        default = mlp.TILING
        for tiling in (default, *(OTHER_MLP if options.tilings else ())):
            mlp.TILING = tiling
            yield {"gelu backward": "one kernel", **shape, "tiling": tiling, "ms": milliseconds(_together, grad, x)}
        mlp.TILING = default


def _gelu(x: Tensor) -> Tensor:
    return gelu(x.float()).to(x.dtype)


def _apart(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    dx = (grad.float() * slope(x.float())).to(x.dtype)
    return dx, dx.sum(0, dtype=torch.float32)


def _together(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    dx, sums = gelu_backward_bias(grad, x)
    return dx, sums.sum(0)


def norms(options: KernelsOptions) -> Iterator[Row]:
    """Yield the times of the backward pass of norm, residual stream and branch bias (milliseconds)."""
    apart = torch.compile(_norm_backward, dynamic=False)
    for rows, columns in ((CONTEXT, 768), (WHOLE, 384)):
        grad_residual, grad_y, x = (normal(rows, columns) for _ in range(3))
        weight, bias = torch.ones(2, columns, device="cuda")
        _, mean, rstd = torch.native_layer_norm(x.float(), (columns,), weight, bias, 1e-6)
        shape = {"rows": rows, "columns": columns}
        took = milliseconds(apart, grad_residual, grad_y, x, mean, rstd, weight, bias)
        yield {"norm backward": "compiled", **shape, "ms": took}
        statistics_of_x, default = (mean.flatten(), rstd.flatten()), residual_norm.TILING
        for tiling in (default, *(OTHER_NORM if options.tilings else ())):
            residual_norm.TILING = tiling
            took = milliseconds(_norm_together, grad_residual, grad_y, x, *statistics_of_x, weight)
            yield {"norm backward": "one kernel", **shape, "tiling": tiling, "ms": took}
        residual_norm.TILING = default


def _norm_backward(
    grad_residual: Tensor, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    grads = torch.ops.aten.native_layer_norm_backward(
        grad_y.float(), x.float(), weight.shape, mean, rstd, weight, bias, [True, True, True]
    )
    return (grads[0] + grad_residual).to(x.dtype), *grads[1:], grad_residual.sum(0, dtype=torch.float32)


def _norm_together(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    grad, sums = residual_norm_backward(*arguments)
    return grad, sums.sum(0)


MEASURES: dict[What, Callable[[KernelsOptions], Iterable[Row]]] = {
    "products": products,
    "attention": attention,
    "mlp": mlps,
    "norm": norms,
}


def step_rate(what: Literal["products", "attention"]) -> float:
    """Measure the TFLOP/s of all matrix products, or of all attention kernels, of a step."""
    flops = seconds = 0.0
    for line in MEASURES[what](KernelsOptions()):
        for work, took in (_product_calls if what == "products" else _attention_calls)(line):
            flops, seconds = flops + work, seconds + took
    return flops / seconds / 1e12


def _product_calls(line: Row) -> Iterator[tuple[float, float]]:
    """Yield FLOPs and seconds of a step's calls of each product of one line."""
    if "part" in line:
        flops = 2.0 * line["rows"] * line["inputs"] * line["outputs"] * BLOCKS[line["part"]]
        for which in ("forward", "of x", "of weight"):
            if rate := line.get(f"tflops {which}"):
                yield flops, flops / (1e12 * rate)


def _attention_calls(line: Row) -> Iterator[tuple[float, float]]:
    """Yield FLOPs and seconds of a step's calls of the kernels that it uses; the backward pass has five products."""
    part, kernel, count = line["attention"], line["kernel"], BLOCKS[line["attention"]]
    flops = 2.0 * line["pairs"] * HEADS * SHAPES[part][0] * count
    if kernel == ("cudnn" if part == "target" else "triton"):
        yield 2 * flops, 1e-6 * line["us forward"] * count
        if part != "target":
            yield 5 * flops, 1e-6 * line["us backward"] * count


def main() -> None:
    options = tyro.cli(KernelsOptions, description=__doc__, prog="benchmarks/kernels.py")
    if not torch.cuda.is_available():
        raise BenchmarkError("torch sees no GPU, which this benchmark needs; run it on a machine with a CUDA GPU")
    if options.json is not None:
        check_writable("--json", options.json)
    lines: list[Row] = [{"device": torch.cuda.get_device_name(), "torch": torch.__version__}]
    for what in options.what:
        for line in MEASURES[what](options):
            lines.append({name: round(value, 4) if isinstance(value, float) else value for name, value in line.items()})
            print(json.dumps(lines[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main, "benchmarks/kernels.py"))

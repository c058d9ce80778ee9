"""Mode `traffic`: kernels, memory traffic and FLOPs of a compiled training step, counted without a GPU.

The step is traced in a process of its own for a GPU that need not exist (fake_gpu.py, traced_step.py). Counts are
facts. Times are estimates from counts and rates (roofline.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields, replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from environment import BenchmarkError
from fake_gpu import GPU, GpuProperties, fake, move, moves_ignored, presented_gpu
from kernel_traffic import Kernel, SequencePairs
from options import TrafficOptions
from rich.console import Console
from roofline import choose_rates, estimate
from scaling_model import parameters, state_bytes
from traced_step import Graph, StepRecorder, TracedStep
from traffic_tables import show_traffic

from dali_pipelines.augmentations import PARAMS
from dali_pipelines.loader import ViewBatch
from dali_pipelines.outputs import SampleKeys
from iwm.compat import HAS_TRITON
from iwm.config import Config
from iwm.config_io import to_dict
from iwm.masking import PackedMasks, mask_buffer_sizes, pack_masks
from iwm.models.flops import training_flops
from iwm.models.predictor import num_action_tokens
from iwm.models.world_model import WorldModel
from iwm.training.distributed import DistEnv
from iwm.training.optim import build_optimizer, step_if_finite
from iwm.training.step import ForwardBackward, sample_step_masks

TORCH = ("2.11", "2.16")
"""First release of torch whose compiler this mode knows, and the first that it does not."""


def run(options: TrafficOptions, console: Console) -> dict[str, Any]:
    """Count, print tables, and return the results for --json. Raises BenchmarkError and ConfigError."""
    options.check()
    config, gpu = options.config, visible_gpu()
    check_can_trace(config)
    with console.status("tracing the step"):
        step = in_own_process(trace_step, config, options.batch_size, gpu)
    flops = training_flops(config)
    rates = choose_rates(options)
    graphs = [summary(graph) for graph in step.graphs]
    result = {
        "recipe": options.recipe,
        "scenario": options.scenario,
        "config": to_dict(config),
        "gpu": asdict(gpu),
        "images": options.batch_size,
        "graphs": graphs,
        "memory": memory(config, graphs),
        "outside": {name: [kernel._asdict() for kernel in kernels] for name, kernels in step.eager.items()},
        "needed_flops_per_image": asdict(flops),
        "rates": {name: rate._asdict() for name, rate in rates.items()},
        "estimate": estimate(step, options.batch_size, flops.total, rates),
    }
    show_traffic(result, options.kernels, console)
    return result


def visible_gpu() -> GpuProperties:
    """Return the properties of this machine's GPU, or an H100's where there is none."""
    if not torch.cuda.is_available():
        return GpuProperties()
    found = torch.cuda.get_device_properties(0)
    known = {field.name: getattr(found, field.name) for field in fields(GpuProperties) if hasattr(found, field.name)}
    return replace(GpuProperties(), **known)


def check_can_trace(config: Config) -> None:
    """Raise BenchmarkError where the step is not compiled, or cannot be traced for a GPU with this torch."""
    if not config.train.compile:
        raise BenchmarkError("--train.no-compile: only compiled steps can be counted; use --train.compile")
    if config.train.precision == "fp8":
        raise BenchmarkError("--train.precision fp8: float8 kernels are not counted; use --train.precision bf16")
    if not HAS_TRITON or torch.version.cuda is None:
        raise BenchmarkError(
            f"torch {torch.__version__} is built without CUDA or Triton; install a build for CUDA (a GPU is not needed)"
        )
    if torch.__version__ < TORCH[0] or torch.__version__ >= TORCH[1]:
        raise BenchmarkError(
            f"torch {torch.__version__}: this mode knows the internals of torch's compiler from {TORCH[0]} to before "
            f"{TORCH[1]}; use such a release"
        )


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new process that sees no GPU."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_hide_gpus) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise BenchmarkError(f"torch {torch.__version__} ended the process that traces the step") from error


def _hide_gpus() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def trace_step(config: Config, images: int, gpu: GpuProperties) -> TracedStep:
    """Trace an optimiser step: one pass of `images` with the masks of step 0, AdamW and the update of the target."""
    dist, extra = DistEnv(0, 1, 0, 1, GPU), num_action_tokens(config)
    sizes = mask_buffer_sizes(config.masking, config.grid_size, extra, images, config.loss.predict)
    masks = pack_masks(sample_step_masks(config, dist, 0, 0, images), sizes, extra, config.loss)
    with torch.device("meta"):
        model = WorldModel(config)
    recorder = StepRecorder(sequence_pairs(masks))
    with presented_gpu(gpu), recorder, recorder.compiling():
        with moves_ignored():
            model.setup(GPU, compiled=True)
        move(model)
        forward_backward = ForwardBackward(model, model)
        recorder.know(model, forward_backward.bf16_weights.tensors)
        size = config.views.size
        source, target = (torch.empty(images, size, size, 3, dtype=torch.uint8, device=GPU) for _ in range(2))
        params, keys = torch.empty(images, len(PARAMS), device=GPU), SampleKeys(torch.empty(0))
        batch, placed = ViewBatch(source, target, params, None, keys), masks.apply(fake)
        with recorder.phase("between compiled parts"):
            result = forward_backward([batch], [placed])
        # apex's kernels move the same bytes as torch's, which can be traced.
        optimizer, _ = build_optimizer(model, replace(config.optim, implementation="torch"), GPU)
        step_if_finite(optimizer, result.skipped)  # the first step also creates the moments
        with recorder.phase("optimiser"):
            step_if_finite(optimizer, result.skipped)
        with recorder.phase("EMA"):
            model.update_target(config.optim.ema_momentum)
    return recorder.step


def sequence_pairs(masks: PackedMasks) -> SequencePairs:
    """Return the pairs of tokens that attention computes in each packing, padding sequences included."""
    return {
        (len(packing.token_index), len(packing.cu_seqlens)): int(packing.cu_seqlens.diff().square().sum())
        for packing in (masks.context, masks.predictor)
        if packing is not None
    }


def memory(config: Config, graphs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the bytes of the model's training state, and of what a pass saves for its backward pass.

    Their sum is the least that training needs; recomputed activations (activation_checkpointing) are not subtracted.
    """
    with torch.device("meta"):
        model = WorldModel(config)
    return {
        "state": state_bytes(parameters(model, trained=True), parameters(model, trained=False)),
        "saved": sum(graph["calls"] * graph["saved_bytes"] for graph in graphs),
    }


class Sums(NamedTuple):
    """Sums over kernels."""

    kernels: int
    bytes: int
    flops: int


def sums(kernels: Iterable[Kernel]) -> Sums:
    kernels = list(kernels)
    return Sums(len(kernels), sum(kernel.bytes for kernel in kernels), sum(kernel.flops for kernel in kernels))


def summary(graph: Graph) -> dict[str, Any]:
    """Return a graph's kernels and sums. All of one call, bytes not per token."""
    kinds = ("gemm", "attention", "pointwise")
    return {
        "part": graph.name,
        "pass": "backward" if graph.backward else "forward",
        "calls": graph.calls.total(),
        "tokens": graph.tokens,
        **{kind: sums(kernel for kernel in graph.kernels if kernel.kind == kind)._asdict() for kind in kinds},
        "saved_bytes": sum(tensor.bytes for tensor in graph.saved),
        "saved": [tensor._asdict() for tensor in graph.saved],
        "kernels": [kernel._asdict() for kernel in graph.kernels],
    }

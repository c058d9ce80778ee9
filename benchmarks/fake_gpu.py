"""A GPU that torch believes in, for tracing and scheduling on a machine that need not have one.

Our kernels, torch's attention and Inductor's fusions depend on the device. `presented_gpu` makes torch answer their
questions as on a machine with that GPU. Tensors there are fake: they have shapes but no data, and nothing can run.

Use it in a process of its own that sees no GPU: torch caches some answers, and its switch to tensors without a driver
cannot be undone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from python_autograd import python_engine
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.constant_folding import ConstantFolder
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class GpuProperties:
    """Properties of a GPU that torch's compiler reads, under their names in torch.cuda.get_device_properties.

    Defaults: an H100.
    """

    name: str = "NVIDIA H100 80GB HBM3"
    major: int = 9
    minor: int = 0
    total_memory: int = 80 * 2**30
    multi_processor_count: int = 132
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    L2_cache_size: int = 50 * 2**20
    shared_memory_per_block: int = 48 * 2**10
    shared_memory_per_block_optin: int = 227 * 2**10
    shared_memory_per_multiprocessor: int = 228 * 2**10
    gcnArchName: str = ""
    is_integrated: int = 0


GPU, HOST = torch.device("cuda", 0), torch.device("cpu")


@contextmanager
def presented_gpu(gpu: GpuProperties) -> Iterator[None]:
    """Present one GPU to torch. Tensors can be created there in a FakeTensorMode only."""
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: gpu.major >= 8,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: gpu,
        "_get_device_properties": lambda device=None: gpu,
        "get_device_capability": lambda device=None: (gpu.major, gpu.minor),
        "get_device_name": lambda device=None: gpu.name,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "synchronize": lambda device=None: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(owner, name, value, create=True))

        for name, answer in answers.items():
            replace(torch.cuda, name, answer)
            if hasattr(CudaInterface, name):  # it holds torch.cuda's functions of the time of its import
                replace(CudaInterface, name, staticmethod(answer))
        replace(torch.accelerator, "current_accelerator", lambda check_available=False: GPU)
        replace(torch.accelerator, "is_available", lambda: False)  # Dynamo would record its current stream
        replace(fake_tensor, "init_gpu_context", lambda device: None)
        replace(FakeTensorMode, "avoid_device_init", property(lambda mode: True))
        replace(_foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, FakeTensor])
        replace(ConstantFolder, "run_node", _on_host(ConstantFolder.run_node))
        replace(F, "scaled_dot_product_attention", _default_attention(gpu))
        stack.enter_context(python_engine())
        # Unaligned matrix products are padded where a measurement on the GPU finds that faster.
        stack.enter_context(inductor_config.patch(shape_padding=False, fx_graph_cache=False, compile_threads=1))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor")
        yield


class _HostConstants(TorchDispatchMode):
    """Create tensors in host memory instead of on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        return func(*args, **(kwargs | {"device": HOST} if kwargs.get("device") is not None else kwargs))


def _on_host(run_node: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Inductor's constant folding, whose constants are real tensors, to keep them in host memory."""

    def run(folder: ConstantFolder, node: Any) -> Any:
        with _HostConstants():
            return run_node(folder, node)

    return run


def _default_attention(gpu: GpuProperties) -> Callable[..., Tensor]:
    """Return F.scaled_dot_product_attention with torch's default choice on this GPU, for which torch asks the driver.

    That is cuDNN's kernel from Hopper on, else flash attention; for float32, and for a mask without cuDNN, it is
    memory-efficient attention.
    """
    aten = torch.ops.aten

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert not enable_gqa  # no layer of this project has fewer keys than queries
        half, trained = q.dtype.itemsize == 2, torch.is_grad_enabled()
        if half and gpu.major >= 9:
            found = aten._scaled_dot_product_cudnn_attention(
                q, k, v, attn_mask, trained, dropout_p, is_causal, False, scale=scale
            )
        elif half and attn_mask is None:
            found = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)
        else:
            bias = None
            if attn_mask is not None:
                bias = q.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
                bias = bias.expand(*q.shape[:3], k.shape[2])
            found = aten._scaled_dot_product_efficient_attention(
                q, k, v, bias, trained, dropout_p, is_causal, scale=scale
            )
        out: Tensor = found[0]
        return out

    return attention


def fake(tensor: Tensor) -> Tensor:
    """Return a fake tensor on the GPU with this tensor's shape, strides and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)


@contextmanager
def moves_ignored() -> Iterator[None]:
    """Make nn.Module.to ignore a move to a device, which torch refuses to tensors without data; `move` does it."""
    original = nn.Module.to

    def to(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        moves = bool(arguments) and isinstance(arguments[0], torch.device)
        return module if moves else original(module, *arguments, **options)

    with patch.object(nn.Module, "to", to):
        yield


def move(module: nn.Module) -> None:
    """Replace a module's parameters and buffers, usually on the meta device, by fake ones on the GPU."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = fake(buffer)

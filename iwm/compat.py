"""Differences between the supported torch releases (2.11 to 2.15), each handled only here."""

from __future__ import annotations

import importlib.util
import inspect

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
"""DDP's option to broadcast buffers before each forward pass; renamed in 2.13."""

REPLANS_CUDNN_VARLEN = torch.__version__ >= "2.14" and torch.__version__ < "2.15"
"""True on 2.14, whose `varlen_attn` plans cuDNN's graph again in each call, which takes 42 ms (pytorch#191576). Earlier
releases have flash attention only, later ones cache the plan. (torch.__version__ compares as a version.)"""

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""True where Triton came with torch, as it does with torch's builds for CUDA."""


def set_recompile_limit(limit: int) -> None:
    """Set the number of compiled graphs per function beyond which torch runs the function uncompiled.

    The limit holds for all functions, because torch 2.11 has no such option of torch.compile.
    """
    torch._dynamo.config.recompile_limit = limit


def set_activation_memory_budget(share: float) -> None:
    """Set the share of activations (0 to 1) that graphs compiled from now on keep for their backward pass."""
    torch._functorch.config.activation_memory_budget = share


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of x: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

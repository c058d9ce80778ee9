"""Differences between the supported torch releases (2.11 to 2.15), each met here alone."""

from __future__ import annotations

import importlib.util
import inspect

import torch
from torch.nn.parallel import DistributedDataParallel

SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
"""DDP's option to broadcast buffers before each forward pass; renamed in 2.13."""

REPLANS_CUDNN_VARLEN = torch.__version__ >= "2.14" and torch.__version__ < "2.15"
"""True on 2.14, whose `varlen_attn` plans cuDNN's graph anew in each call, 42 ms (pytorch#191576). Releases before it
have flash alone, later ones keep the plan. (torch.__version__ compares as a version.)"""

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""True where Triton came with torch, as it does with torch's builds for CUDA."""


def allow_graphs(limit: int) -> None:
    """Let each function have `limit` compiled graphs, in this process; beyond it torch runs without compiling.

    For all functions: torch 2.11 has no such option of torch.compile.
    """
    torch._dynamo.config.recompile_limit = limit

"""What the pipeline is measured against in mode `all`: JPEG decoding alone, its limit, and torchvision's loader.

Short, in one turn; mode `data` compares with care.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from data_contenders import Device, Work, entrants
from pinned import measure, summary
from rich.console import Console

from iwm.config import Config

SECONDS, WINDOWS = 2.0, 4


def pipeline_limits(config: Config, device: torch.device, threads: int, console: Console) -> dict[str, dict[str, Any]]:
    """Images/s of each contender in a process of its own, by the clock and per second of CPU time, on as many cores as
    the pipeline has threads. Raises ShardError."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    batch = min(config.data.batch, 64)
    backend: Device = "cuda" if device.type == "cuda" else "cpu"
    work = Work(config.data.shards, config.data.train, config.views, batch, len(cores))
    limits = {}
    for name, contender in entrants(work, backend, ("torchvision", "decode"), console).items():
        with console.status(f"beside training: {name}"):
            rates = measure(contender.stream, cores, SECONDS, WINDOWS)
        limits[name] = {
            "wall": summary([rate.wall for rate in rates]),
            "core": summary([rate.core for rate in rates]),
        }
    return limits

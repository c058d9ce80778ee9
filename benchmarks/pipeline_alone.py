"""The pipeline by itself in mode `all`: what each of its operators costs, its limit (JPEG decoding), its rivals.

Short; mode `data` compares with care.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from data_contenders import Device, Work, entrants
from pinned import measure
from pipeline_stages import stage_times
from rich.console import Console
from turns import spread

from iwm.config import Config

BATCH = 64
"""Most images at once."""
SECONDS, WINDOWS = 2.0, 4
STAGES_SECONDS = 4.0
"""Of all stages together, once they are built."""


def pipeline_limits(config: Config, device: torch.device, threads: int, console: Console) -> dict[str, dict[str, Any]]:
    """Images/s of JPEG decoding and of torchvision's loaders, each in a process of its own on as many cores as the
    pipeline has threads, by the clock and per second of CPU time. Raises ShardError."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    batch, backend = min(config.data.batch, BATCH), kind(device)
    work = Work(config.data.shards, config.data.train, config.views, batch, len(cores))
    others = entrants(work, backend, ("torchvision", "decode"), console)
    limits = {}
    for name in [name for name in others if name != "dali"]:
        with console.status(f"beside training: {name}"):
            rates = measure(others[name].stream, cores, SECONDS, WINDOWS)
        limits[name] = {
            "wall": spread([rate.wall for rate in rates]),
            "core": spread([rate.core for rate in rates]),
        }
    return limits


def pipeline_stages(
    config: Config, device: torch.device, threads: int, console: Console
) -> dict[str, dict[str, float]]:
    """Milliseconds per image that each operator adds: median, p10 and p90. Raises ShardError.

    On a GPU by the clock, with training's threads, or one core would be timed; on a CPU of CPU time, on one core.
    """
    with console.status("beside training: the pipeline's operators"):
        return stage_times(
            config.data.shards,
            config.data.train,
            config.views,
            device=kind(device),
            threads=threads if device.type == "cuda" else 1,
            batch=min(config.data.batch, BATCH),
            seconds=STAGES_SECONDS,
        )


def kind(device: torch.device) -> Device:
    return "cuda" if device.type == "cuda" else "cpu"

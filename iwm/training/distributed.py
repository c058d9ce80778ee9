"""Which process this is, and the few things that processes say to each other."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from iwm.config import ConfigError, Train
from iwm.training.memory import keep_freed_memory
from shards.pool import available_cores

HOST_THREADS = 2
"""Threads of torch's operators beside a GPU: they draw and pack masks while the pipeline decodes on the other cores.
torch's default, a thread a core, would compete with the pipeline's threads."""


@dataclass(frozen=True)
class World:
    """This process among all of the run's: its rank, how many there are, and the same within this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and the display."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def world(train: Train, options: str = "train.") -> Iterator[World]:
    """Join the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), or be the only process.

    Raises ConfigError where there is no such device; `options` stands before the option's name in it.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = _device(train.device, local_rank, options)
    stream: AbstractContextManager[object] = nullcontext()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.set_num_threads(train.threads or HOST_THREADS)
        # Never on the default stream, which no CUDA graph can be captured on.
        stream = torch.cuda.stream(torch.cuda.Stream(device, priority=-1 if train.priority_stream else 0))
    else:
        keep_freed_memory()
        if train.threads or local_size > 1:
            # torchrun gives each process one thread unless told otherwise.
            torch.set_num_threads(train.threads or cores_each(local_size))
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    try:
        with stream:
            yield World(rank, size, local_rank, local_size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


def _device(wanted: str, local_rank: int, options: str) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError(
            f"{options}device cuda: torch sees no GPU on {socket.gethostname()}; use {options}device auto or cpu"
        )
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{socket.gethostname()} has {torch.cuda.device_count()} GPUs, but torchrun started process {local_rank} "
            "there: lower --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """What is computed on, for the record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def loader_threads(device: torch.device, processes: int) -> int:
    """Pipeline threads for each of a machine's processes: its cores, less HOST_THREADS where the model is on a GPU."""
    cores = cores_each(processes)
    return cores if device.type == "cpu" else max(1, cores - HOST_THREADS)


def cores_each(processes: int) -> int:
    """CPU cores for each of a machine's processes, at least one."""
    return max(1, available_cores() // processes)


class StopAgreement:
    """All processes stop after the same step, though the signal may reach them at different moments.

    Each step's wish is reduced while the next step runs, over gloo, so that neither host nor device waits for it.
    """

    def __init__(self, here: World) -> None:
        self._here = here
        self._wish = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None

    def agreed(self, wanted: bool) -> bool:
        """Call once per step on every process: whether any process wanted to stop by the step before."""
        if self._here.size == 1:
            return wanted
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._wish.item())
        self._wish = torch.tensor([int(wanted)], dtype=torch.int32)
        self._pending = dist.all_reduce(self._wish, op=dist.ReduceOp.MAX, async_op=True)
        return stop

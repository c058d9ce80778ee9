"""Distributed setup and collectives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from iwm.config import TrainConfig
from iwm.training.runtime import configure_cpu, select_device
from shards.workers import available_cores

HOST_THREADS = 2
"""Number of threads of torch's CPU operators where the model is on a GPU. They sample and pack masks while the pipeline
decodes on the other cores. torch's default, one thread per core, would compete with the pipeline's threads."""


@dataclass(frozen=True)
class DistEnv:
    """Rank and device of this process, and the number of processes of the run and of this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, the process that writes files and the display."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Average over processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
            values /= self.size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


@contextmanager
def init_distributed(train: TrainConfig, options: str = "train.") -> Iterator[DistEnv]:
    """Join the process group that torchrun describes (NCCL on GPUs, gloo on CPUs); without torchrun, a single process.

    Raises ConfigError where the device does not exist. options: prefix of the option's name in the message.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = select_device(train.device, f"{options}device", local_rank)
    stream: AbstractContextManager[object] = nullcontext()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.set_num_threads(train.num_threads or HOST_THREADS)
        # A CUDA graph cannot be captured on the default stream.
        stream = torch.cuda.stream(torch.cuda.Stream(device, priority=-1 if train.priority_stream else 0))
    else:
        # By default torchrun limits each process to one thread.
        configure_cpu(train.num_threads or (cores_per_process(local_size) if local_size > 1 else None))
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    try:
        with stream:
            yield DistEnv(rank, size, local_rank, local_size, device)
    finally:
        if size > 1:
            torch.distributed.destroy_process_group()


def loader_threads(device: torch.device, processes: int) -> int:
    """Return the pipeline threads per process: its share of the cores, minus HOST_THREADS for a model on a GPU."""
    cores = cores_per_process(processes)
    return cores if device.type == "cpu" else max(1, cores - HOST_THREADS)


def cores_per_process(processes: int) -> int:
    """Return the number of CPU cores for each of a machine's processes, at least one."""
    return max(1, available_cores() // processes)


class StopConsensus:
    """Agreement of all processes to stop after the same step, though signals reach them at different moments.

    The stop flags of a step are reduced over gloo while the next step runs, so that neither host nor device waits.
    """

    def __init__(self, dist: DistEnv) -> None:
        self._dist = dist
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None

    def any_rank_stopped(self, flag: bool) -> bool:
        """Return True where any process had its stop flag set by the previous step.

        flag: stop flag of this process. Call once per step on every process.
        """
        if self._dist.size == 1:
            return flag
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._flag.item())
        self._flag = torch.tensor([int(flag)], dtype=torch.int32)
        self._pending = torch.distributed.all_reduce(self._flag, op=torch.distributed.ReduceOp.MAX, async_op=True)
        return stop

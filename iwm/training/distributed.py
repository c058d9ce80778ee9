"""Distributed setup and collectives."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from iwm.train_config import TrainConfig
from iwm.training.heartbeats import Heartbeats
from iwm.training.launch import Launch, LaunchError, check_host, find_launch, gpu_index, step_cores
from iwm.training.rank_progress import RankProgress
from iwm.training.runtime import configure_cpu, select_device
from iwm.training.watchdog import Watchdog
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
    launched_by: str = ""
    """Launcher, nodes, job and restarts in words; empty for a process that nobody launched."""
    progress: RankProgress = field(default_factory=RankProgress, compare=False, repr=False)
    """Phase and step of this process, for its watchdog and the other processes."""

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

    def wait_for_all(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            torch.distributed.all_reduce(torch.zeros(1))


@contextmanager
def init_distributed(
    train: TrainConfig, options: str = "train.", watchdog: Watchdog | None = None
) -> Iterator[DistEnv]:
    """Join the process group that torchrun or srun describes (NCCL on GPUs, gloo on CPUs); else, a single process.

    Raises ConfigError where the device does not exist, LaunchError where the processes cannot meet. options: prefix of
    the option's name in the message. watchdog: the process's, which then exchanges heartbeats with the other processes.
    """
    launch = find_launch(os.environ)
    device = select_device(train.device, f"{options}device", gpu_index(launch, torch.cuda.device_count()))
    stream: AbstractContextManager[object] = nullcontext()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.set_num_threads(train.num_threads or HOST_THREADS)
        # A CUDA graph cannot be captured on the default stream.
        stream = torch.cuda.stream(torch.cuda.Stream(device, priority=-1 if train.priority_stream else 0))
    else:
        # By default torchrun limits each process to one thread.
        configure_cpu(train.num_threads or (cores_per_process(launch.local_size) if launch.local_size > 1 else None))
    if launch.size > 1:
        _join(launch, device, timedelta(seconds=train.collective_timeout))
    progress = RankProgress() if watchdog is None else watchdog.progress
    if watchdog is not None and launch.size > 1:
        watchdog.join(Heartbeats(_get_default_store(), launch.rank, launch.size, progress), launch.local_rank)
    try:
        with stream:
            yield DistEnv(
                launch.rank, launch.size, launch.local_rank, launch.local_size, device, launch.description, progress
            )
    finally:
        if launch.size > 1:
            torch.distributed.destroy_process_group()


def _join(launch: Launch, device: torch.device, timeout: timedelta) -> None:
    """Join the process group, whose collectives fail after `timeout`.

    Raises LaunchError where the processes cannot meet or share a GPU.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    own_device = device if device.type == "cuda" else None
    try:
        if launch.rendezvous is None:
            torch.distributed.init_process_group(backend, timeout=timeout, device_id=own_device)
        else:
            address, port = launch.rendezvous
            check_host(address)
            torch.distributed.init_process_group(
                backend, init_method=f"tcp://{address}:{port}", rank=launch.rank, world_size=launch.size,
                timeout=timeout, device_id=own_device,
            )  # fmt: skip
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        raise LaunchError(
            f"the {launch.size} processes could not meet ({str(error).splitlines()[0]}); set MASTER_ADDR to an address "
            "of the node of rank 0 and MASTER_PORT to a free port there"
        ) from error
    except torch.distributed.DistBackendError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise LaunchError(
            f"rank {launch.rank} shares {device} of {socket.gethostname()} with another process; start one process per "
            "GPU (srun: --gpus-per-task=1, or as many --ntasks-per-node as GPUs)"
        ) from error


def loader_threads(device: torch.device, processes: int) -> int:
    """Return the pipeline threads per process: its share of the cores, minus HOST_THREADS for a model on a GPU."""
    cores = cores_per_process(processes)
    return cores if device.type == "cpu" else max(1, cores - HOST_THREADS)


def cores_per_process(processes: int) -> int:
    """Return the number of CPU cores for each of a machine's processes, at least one.

    A task of srun may be bound to its own cores, or may see all those of the machine.
    """
    step = step_cores(os.environ)
    return max(1, available_cores() // processes if step is None else min(available_cores(), step // processes))


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

        flag: stop flag of this process. Call once per step on every process. Where a process stops because its launcher
        is gone, all learn it (progress.launcher_lost).
        """
        if self._dist.size == 1:
            return flag
        stop = False
        if self._pending is not None:
            self._pending.wait()
            stop = bool(self._flag.item())
            if self._flag.item() == _LAUNCHER_LOST:
                self._dist.progress.launcher_lost = True
        own = _LAUNCHER_LOST if flag and self._dist.progress.launcher_lost else int(flag)
        self._flag = torch.tensor([own], dtype=torch.int32)
        self._pending = torch.distributed.all_reduce(self._flag, op=torch.distributed.ReduceOp.MAX, async_op=True)
        return stop


_LAUNCHER_LOST = 2
"""Stop flag of a process whose launcher is gone; 1 is that of a signal."""

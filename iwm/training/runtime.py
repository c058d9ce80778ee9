"""Process runtime: stop signals, device, host memory, threads and garbage collection.

SIGTERM, SIGUSR1 and Ctrl-C end a run after its current step, with a checkpoint and exit status 0.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import platform
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from dali_pipelines.augmentations import ViewBackend
from dali_pipelines.photometric_kernels import missing_ops
from dali_pipelines.views import Views
from iwm.compat import HAS_TRITON
from iwm.config import ConfigError, PipelineBackend


class StopFlag:
    """Stop flag, true once a stop signal was received."""

    signal: signal.Signals | None = None
    """The signal received; None before."""

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Set the stop flag at the first stop signal; after that, Ctrl-C raises KeyboardInterrupt at once."""
    stop = StopFlag()

    def handler(number: int, frame: FrameType | None) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Options of mallopt, from glibc's malloc.h."""
_NEVER = 1 << 30


def disable_malloc_trim() -> bool:
    """Stop glibc from returning freed memory to the system. Return False where the C library is not glibc.

    On a CPU each step allocates and frees the same tensors. If their memory is returned, the kernel allocates and
    zeroes each page again in every step: 2,600 page faults and a tenth of the step time of the recipe `demo`.
    """
    name = ctypes.util.find_library("c")
    libc = ctypes.CDLL(name) if name else None
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    return all(libc.mallopt(option, _NEVER) == 1 for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))


def configure_cpu(num_threads: int | None) -> None:
    """Configure memory and torch's threads for computing on the CPU. Small models are slower with more threads.

    num_threads: None or 0 leaves torch's default.
    """
    disable_malloc_trim()
    if num_threads:
        torch.set_num_threads(num_threads)


def select_device(name: str, option: str, local_rank: int = 0) -> torch.device:
    """Return the device for `auto` (a GPU if there is one), `cpu` or `cuda` on this machine.

    local_rank: index of the GPU. Raises ConfigError, which names `option`, where the device does not exist.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(f"{option} cuda: torch sees no GPU on {socket.gethostname()}; use {option} cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{socket.gethostname()} has {torch.cuda.device_count()} GPUs, but a process with local rank "
            f"{local_rank} was started there; lower --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


def select_backend(name: PipelineBackend, device: torch.device, views: Views, option: str) -> ViewBackend:
    """Return the backend of the two-view pipeline; `auto` is `gpu` where the model is on a GPU, else `cpu`.

    device: device of the model. Raises ConfigError, which names `option`, where the machine or the views rule the
    backend out.
    """
    if name == "auto":
        return "gpu" if device.type == "cuda" else "cpu"
    if name != "cpu" and device.type != "cuda":
        raise ConfigError(f"{option} {name}: it needs a GPU, and the model is on the CPU; use {option} cpu")
    if name == "triton" and not HAS_TRITON:
        raise ConfigError(f"{option} triton: torch came without Triton; use {option} gpu, or torch's build for CUDA")
    if name == "triton" and (missing := missing_ops(views)):
        raise ConfigError(
            f"{option} triton: its kernels lack {', '.join(missing)}; use {option} gpu, or add them to "
            "dali_pipelines/photometric_triton.py"
        )
    return name


def device_name(device: torch.device) -> str:
    """Return the device's name for results: the GPU's, or `cpu` with the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({processor()})"


def processor() -> str:
    """Return the system's name of the processor, or its architecture where the system has no name for it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@contextmanager
def manual_gc() -> Iterator[None]:
    """Disable automatic garbage collection; the loop collects when it logs metrics.

    Otherwise one process pauses while the others wait for it. Objects that exist before the first step are frozen:
    scanning them takes hundreds of milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()

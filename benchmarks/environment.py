"""Environment of a measurement, stored in every result, and checks of the user's options."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from clocks import query

from dali_pipelines import DALI_PACKAGES
from shards.errors import UserError

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "timm")


def environment_info() -> dict[str, Any]:
    """Return processor, cores, memory, GPU, versions and the commit.

    The commit has a plus sign for uncommitted changes, and is `unknown` without git or a checkout.
    """
    # Not at the top: commands that only read their options import this module too.
    import torch

    from iwm.training.run_record import source_commit
    from iwm.training.runtime import processor

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": driver(),
        "packages": packages(),
        "commit": source_commit(Path(__file__).parents[1], modified="+") or "unknown",
    }


_COUNT_GPUS = """
from ctypes import CDLL, byref, c_int
driver, count = CDLL("libcuda.so.1"), c_int()
raise SystemExit(driver.cuInit(0) or driver.cuDeviceGetCount(byref(count)) or count.value == 0)
"""


def has_gpu() -> bool:
    """Return True where torch would find a GPU, without importing torch, which takes seconds.

    It asks the driver for its number of devices, as torch does, unless torch is built for the CPU. It asks in a process
    of its own, so that this one still loads the driver through torch.
    """
    if "+cpu" in (_version("torch") or ""):
        return False
    return subprocess.run([sys.executable, "-S", "-c", _COUNT_GPUS], check=False, capture_output=True).returncode == 0


def packages() -> dict[str, str | None]:
    """Return package versions, None for packages that are not installed. Missing DALI is listed as `nvidia-dali`."""
    dali = [name for name in DALI_PACKAGES if _version(name) is not None] or ["nvidia-dali"]
    return {name: _version(name) for name in (*PACKAGES, *dali)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """Return the version of the GPU's driver; None where nvidia-smi does not report it."""
    values, _ = query(["driver_version"])
    return values[0] if values else None


T = TypeVar("T")


class BenchmarkError(UserError):
    """Invalid option or environment; the message names the option and the remedy."""


def lookup(option: str, name: str, table: Mapping[str, T]) -> T:
    """Return the table's entry of that name. Raises BenchmarkError with the known names where there is none."""
    if name not in table:
        raise BenchmarkError(f"{option} {name}: does not exist; choose from {', '.join(table)}")
    return table[name]


def check_writable(option: str, file: Path) -> None:
    """Create the file's folder. Raises BenchmarkError where the file could not be written there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"{option} {file}: its folder cannot be created ({error.strerror})") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise BenchmarkError(f"{option} {file}: the file cannot be written; choose another path")

"""What a measurement was made on: written into every result, for without it a number means nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from clocks import query

from dali_pipelines import DALI_PACKAGES
from iwm.training.tuned import processor

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "timm")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU, versions and the commit."""
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
        "commit": _commit(),
    }


def packages() -> dict[str, str | None]:
    """Versions of what is installed, None for what is not. DALI without a package is called `nvidia-dali`."""
    dali = [name for name in DALI_PACKAGES if _version(name) is not None] or ["nvidia-dali"]
    return {name: _version(name) for name in (*PACKAGES, *dali)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of the GPU's driver; None where nvidia-smi does not tell it."""
    values, _ = query(["driver_version"])
    return values[0] if values else None


def _commit() -> str:
    """The commit, with a plus sign where the tree has changes on top; `unknown` without git or a repository."""
    if shutil.which("git") is None:
        return "unknown"
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"

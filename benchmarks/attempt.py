"""One check of the checklist, run under supervision with a limit of time."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from iwm.training.signals import StopWish

ROOT = Path(__file__).parents[1]
PASSED = "passed"
PATIENCE = 30.0
"""Seconds that the supervisor has to end everything below it."""


def attempt(words: list[str], log: Path, seconds: float, wish: StopWish, environment: Mapping[str, str]) -> str:
    """Run `python WORDS`, its output to `log`; PASSED, or the way in which it did not.

    The command, its children and grandchildren end after so many seconds, at a signal, and when this process dies.
    """
    supervised = [sys.executable, "benchmarks/supervise.py", str(os.getpid()), *words]
    until = time.monotonic() + seconds
    with open(log, "w") as file:
        print("python", *words, file=file, flush=True)
        # In a session apart: Ctrl-C reaches it by way of this process alone.
        process = subprocess.Popen(
            supervised, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        code = None
        try:
            while code is None and not wish and time.monotonic() < until:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(min(0.2, max(0.0, until - time.monotonic())))
        finally:
            if code is None:
                process.terminate()
                process.wait(PATIENCE)
    if code == 0:
        return PASSED
    if code is not None:
        return f"FAILED with code {code}"
    return f"stopped by {wish.signal.name}" if wish.signal else f"stopped after {seconds / 60:.3g} minutes"


def environment(out: Path) -> dict[str, str]:
    """The caller's variables, with the project first in PYTHONPATH and this OUT's folder for compiled kernels."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(kernels(out))}


def kernels(out: Path) -> Path:
    """Folder of compiled kernels, outside OUT, which is to be copied and kept."""
    name = hashlib.sha256(str(out).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"iwm-checklist-{os.getuid()}-{name}"


def clear(paths: Iterable[Path]) -> None:
    """Remove files and folders, where they exist."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def clear_since(folder: Path, began: float) -> None:
    """Remove the files of a folder that changed after a time in seconds since the epoch.

    A compiler that was killed leaves half a file, which the cache would take for a whole one.
    """
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mtime >= began - 1:
            path.unlink()

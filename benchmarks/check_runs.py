"""Supervised execution of the checklist's checks, and their results in OUT/checklist.json."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from environment import BenchmarkError

from iwm.training.runtime import StopFlag
from shards.atomic import write_atomically

ROOT = Path(__file__).parents[1]
PASSED = "passed"
PATIENCE = 30.0
"""Time that the supervisor has to end all its descendants (seconds)."""


def run_check(words: list[str], log: Path, seconds: float, stop: StopFlag, environment: Mapping[str, str]) -> str:
    """Run `python WORDS` with its output in `log`; return PASSED or a description of the failure.

    The command and all its descendants are ended after `seconds`, at a signal, and when this process dies.
    """
    supervised = [sys.executable, "benchmarks/supervise.py", str(os.getpid()), *words]
    until = time.monotonic() + seconds
    with open(log, "w") as file:
        print("python", *words, file=file, flush=True)
        # In its own session, so that Ctrl-C reaches it only through this process.
        process = subprocess.Popen(
            supervised, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        code = None
        try:
            while code is None and not stop and time.monotonic() < until:
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
    return f"stopped by {stop.signal.name}" if stop.signal else f"stopped after {seconds / 60:.3g} minutes"


def check_environ(out: Path) -> dict[str, str]:
    """Return the environment, with the project first in PYTHONPATH and this OUT's cache folder of compiled kernels."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(kernel_cache_dir(out))}


def kernel_cache_dir(out: Path) -> Path:
    """Return the cache folder of compiled kernels. It is outside OUT, which users copy and archive."""
    name = hashlib.sha256(str(out).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"iwm-checklist-{os.getuid()}-{name}"


def clear(paths: Iterable[Path]) -> None:
    """Remove files and folders that exist."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def clear_since(folder: Path, began: float) -> None:
    """Remove the files of a folder that changed after `began` (seconds since the epoch).

    A killed compiler can leave an incomplete file, which the cache would take for a complete one.
    """
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mtime >= began - 1:
            path.unlink()


RUNNING = "running"
"""State of a check that was interrupted together with the checklist."""


class CheckResults:
    """Outcome of each check, with the configuration and machine of the checklist."""

    def __init__(self, file: Path, tiny: bool, machine: dict[str, Any]) -> None:
        self.checks: dict[str, dict[str, Any]] = {}
        self._file = file
        self._configuration = configuration(tiny, machine)
        self._content = {"configuration": self._configuration, "machine": machine, "checks": self.checks}

    def resume(self, fresh: bool) -> None:
        """Load the outcomes from the file, if it exists.

        Raises BenchmarkError where the file cannot be read or belongs to another configuration. fresh: in these cases
        start without outcomes instead.
        """
        if not self._file.exists():
            return
        remedy = "choose another OUT, or repeat all checks with --fresh"
        try:
            content = json.loads(self._file.read_text())
            then, found = content["configuration"], content["checks"]
        except (json.JSONDecodeError, KeyError) as error:
            if fresh:
                return
            raise BenchmarkError(f"{self._file}: not the results of this checklist ({error!r}); {remedy}") from error
        now = self._configuration
        if different := [name for name in now if then.get(name) != now[name]]:
            if fresh:
                return
            changes = ", ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in different)
            raise BenchmarkError(f"{self._file}: the results have another configuration: {changes}; {remedy}")
        self.checks |= found

    def forget(self, names: Iterable[str]) -> None:
        """Remove the outcomes of these checks, so that they are repeated."""
        for name in names:
            self.checks.pop(name, None)

    def record(self, name: str, outcome: dict[str, Any]) -> None:
        """Set one check's outcome and write the file at once, so that losing the machine loses no outcome."""
        self.checks[name] = outcome
        write_atomically(self._file, (json.dumps(self._content, indent=1) + "\n").encode())


def configuration(tiny: bool, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the properties that all results of one checklist share."""
    packages = {name: found for name, found in machine["packages"].items() if "torch" in name or "dali" in name}
    same = ("commit", "gpu", "processor", "cores", "python")
    return {"tiny": tiny, **{name: machine[name] for name in same}, **packages}

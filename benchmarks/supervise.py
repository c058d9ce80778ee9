"""Supervisor that leaves no process of a command running: python benchmarks/supervise.py PARENT WORD ...

Runs `python WORD ...` and returns its exit code. When the command ends, when this process receives a stop signal, or
when the process PARENT dies, all descendants of the command are ended too, including those in their own sessions: this
process adopts orphaned descendants. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

GRACE = 5.0
"""Time between SIGTERM and SIGKILL (seconds)."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
"""Option numbers of prctl(2)."""


def main() -> int:
    parent, words = int(sys.argv[1]), sys.argv[2:]
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before it could be watched
        return 128 + signal.SIGTERM
    child = subprocess.Popen([sys.executable, *words])
    code = None
    while code is None and not signals:
        with suppress(subprocess.TimeoutExpired):
            code = child.wait(0.1)
    end_descendants()
    if code is None:
        return 128 + signals[0]
    return code if code >= 0 else 128 - code


def end_descendants(grace: float = GRACE) -> None:
    """End all descendants of this process: send SIGTERM, and SIGKILL to those left after `grace` seconds."""
    signalled: set[int] = set()
    until = time.monotonic() + grace
    while alive := descendants(os.getpid()):
        kill = time.monotonic() > until
        for pid in alive if kill else alive - signalled:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
        signalled |= alive
        time.sleep(0.02)
        _reap()


def descendants(root: int) -> set[int]:
    """Return the process ids of the descendants of `root` that have not ended."""
    children: dict[int, list[int]] = {}
    ended: set[int] = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # The name, in brackets, may contain spaces; state and parent follow it.
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(parent), []).append(int(folder.name))
        if state in "ZX":
            ended.add(int(folder.name))
    found: set[int] = set()
    level = [root]
    while level:
        level = [child for parent in level for child in children.get(parent, [])]
        found |= set(level)
    return found - ended


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    sys.exit(main())

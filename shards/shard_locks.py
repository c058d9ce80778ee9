"""Locks on the shards of a cache, one byte of a file for each shard, between processes and between loaders of one.

The locks are the kernel's (open file description locks): it releases those of a process that was killed.
"""

from __future__ import annotations

import fcntl
import os
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ShardLocks:
    """Locks on shards by number, in the name of the loader that opened them; nothing is held at first."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._file)

    def share(self, shard: int) -> None:
        """Hold the shard together with others. Waits while one holds it alone."""
        self._lock(fcntl.F_RDLCK, shard, wait=True)

    @contextmanager
    def held(self, shard: int) -> Iterator[None]:
        """Hold the shard alone in the context. Waits while others hold it."""
        self._lock(fcntl.F_WRLCK, shard, wait=True)
        try:
            yield
        finally:
            self.release(shard)

    def try_to_hold(self, shard: int) -> bool:
        """Hold the shard alone; return False where others hold it."""
        try:
            self._lock(fcntl.F_WRLCK, shard, wait=False)
        except BlockingIOError:
            return False
        return True

    def release(self, shard: int) -> None:
        self._lock(fcntl.F_UNLCK, shard, wait=False)

    def _lock(self, kind: int, shard: int, wait: bool) -> None:
        # struct flock of Linux: type, whence (absolute), start, length, process (must be 0).
        request = struct.pack("hhqqi4x", kind, os.SEEK_SET, shard, 1, 0)
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)

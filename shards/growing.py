"""Bytes that grow at their end and may become more than fit in memory, for the list of a source's samples."""

from __future__ import annotations

import mmap
import tempfile
from typing import IO

from shards.errors import ShardError

SPILL_AT = 2**29
"""Size from which the bytes lie in a temporary file (bytes)."""


class GrowingBytes:
    """Bytes in memory; from SPILL_AT on in a file without a name, in the folder that TMPDIR names.

    The system keeps as much of the file in memory as is free, and deletes it with the process.
    """

    def __init__(self) -> None:
        self._memory = bytearray()
        self._file: IO[bytes] | None = None
        self._map: mmap.mmap | None = None
        self.size = 0

    def append(self, data: bytes) -> int:
        """Append bytes and return where they begin. Raise ShardError where the file cannot be written."""
        start, self.size = self.size, self.size + len(data)
        if self.size < SPILL_AT:
            self._memory += data
            return start
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this object
                self._file.write(self._memory)
                self._memory = bytearray()
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise ShardError(
                f"cannot write the list of samples to {tempfile.gettempdir()}: {error.strerror}; "
                "set TMPDIR to a folder with more space"
            ) from error
        return start

    @property
    def content(self) -> bytearray | mmap.mmap:
        """All bytes, not copied: valid until the next append."""
        if self._file is None:
            return self._memory
        if self._map is None or len(self._map) != self.size:
            self._map = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ)
        return self._map

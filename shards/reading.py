"""Reading the bytes of references: whole files, and stretches of tars that stay open."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from shards.listing import Reference
from shards.manifest import ShardError

_OPEN_TARS = 64


class Reader:
    """Reads references; use it as a context manager, since it keeps up to 64 tars open."""

    def __init__(self) -> None:
        self._tars: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._tars.values():
            os.close(descriptor)

    def prefetch(self, references: list[Reference]) -> None:
        """Tell the kernel which stretches of tars come next: samples are shuffled, so it cannot guess."""
        for path, offset, size in sorted((r.path, r.offset, r.size) for r in references if r.offset is not None):
            with _explain(path):
                os.posix_fadvise(self._tar(path), offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, reference: Reference) -> bytes:
        """All of the reference's bytes. ShardError where they cannot be read, or changed since they were listed."""
        with _explain(reference.path):
            if reference.offset is None:
                with open(reference.path, "rb") as file:
                    data = file.read()
            else:
                data = os.pread(self._tar(reference.path), reference.size, reference.offset)
        if len(data) != reference.size:
            raise ShardError(f"{reference.path} has changed since the run began ({reference.name}); {_REMEDY}")
        return data

    def _tar(self, path: str) -> int:
        if path not in self._tars:
            if len(self._tars) == _OPEN_TARS:
                os.close(self._tars.popitem(last=False)[1])
            self._tars[path] = os.open(path, os.O_RDONLY)
        self._tars.move_to_end(path)
        return self._tars[path]


@contextmanager
def _explain(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ShardError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from error


_REMEDY = "mend that, then run the same command again: finished shards are kept"

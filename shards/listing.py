"""Sample lists of sources: file references without decoding or unpacking.

Every source module returns a SampleList in a fixed order. TarReader reads the bytes of references. list_members lists
the files of a tar, also of a tar inside a tar, without unpacking it.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

from shards.errors import ShardError
from shards.format import Column, RejectedSample, RejectionRecord
from shards.samples import FileRef, SampleTable

LABEL = "label"
"""Name of the main label column; its tar component is `cls`."""

Labels = Literal["auto", "folders", "none"]
"""Origin of the labels: detected, the folders of the images, or no labels."""

MAX_INTEGER_CLASS = 1_000_000
"""Largest label that is taken as a class index."""

_COLUMN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")


@dataclass
class SampleList:
    """Contents of a source. Each file found is a sample, a rejection, or hidden (its name begins with a dot).

    `labelling` tells the user where the labels come from, and the option that gives the other choice.
    """

    columns: list[Column]
    samples: SampleTable = field(default_factory=SampleTable)
    rejections: list[RejectionRecord] = field(default_factory=list)
    hidden: int = 0
    masks: bool = False
    labelling: str = ""


def file_ref(folder: Path, name: str) -> FileRef:
    """Return a reference to the whole file `name` in `folder`. Raise RejectedSample where it does not exist."""
    path = folder / name
    if not path.is_file():
        raise RejectedSample(f"no such file: {path}" if not path.exists() else f"not a regular file: {path}")
    return FileRef(str(folder), name, None, path.stat().st_size)


def sample_key(name: str) -> str:
    """Encode any name as a WebDataset key: letters, digits, `_` and `-` stay, all other bytes become `%XX`.

    `urllib.parse.unquote` decodes it. A key must not contain a dot (WebDataset ends the key there), a slash, or a space
    (DALI's index separates fields by spaces).
    """
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]):02X}", os.fsencode(name).decode("latin-1"))


_ESCAPED = re.compile(r"[^A-Za-z0-9_-]")


def fit_key(key: str, length: int) -> str:
    """Return the key; where it is longer than `length` characters, its beginning, `~` and 16 digits of its SHA-256.

    The name field of a tar header has 100 bytes, and DALI's index does not support extended headers.
    """
    if len(key) <= length:
        return key
    return f"{key[: length - 17]}~{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def column(name: str, values: Iterable[str]) -> Column:
    """Make the label column `name` with the classes that occur in `values`.

    Labels that are all non-negative integers are class indices: the classes are 0 to the largest, including those that
    do not occur. Other labels are class names and are sorted. Raise ShardError for a column name that cannot be a tar
    component, and for an integer above MAX_INTEGER_CLASS.
    """
    if not _COLUMN_NAME.fullmatch(name):
        raise ShardError(
            f"label column '{name}' cannot be a tar component: "
            "rename it to at most 32 letters, digits and underscores, beginning with a letter"
        )
    distinct = set(values)
    component = "cls" if name == LABEL else f"{name}.cls"
    if distinct and all(value.isdecimal() and value == str(int(value)) for value in distinct):
        largest = max(int(value) for value in distinct)
        if largest > MAX_INTEGER_CLASS:
            raise ShardError(
                f"label column '{name}': {largest} is too large for a class index (at most {MAX_INTEGER_CLASS:,}); "
                "use class names that are not numbers"
            )
        return Column(name, component, [str(index) for index in range(largest + 1)])
    return Column(name, component, sorted(distinct))


_OPEN_TARS = 64


class TarReader:
    """Reader of references. Use it as a context manager: it keeps up to 64 tars open."""

    def __init__(self) -> None:
        self._tars: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> TarReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._tars.values():
            os.close(descriptor)

    def prefetch(self, references: list[FileRef]) -> None:
        """Announce the byte ranges of tars to the kernel's read-ahead, which cannot predict shuffled reads."""
        for path, offset, size in sorted((r.path, r.offset, r.size) for r in references if r.offset is not None):
            with _explain(path):
                os.posix_fadvise(self._tar(path), offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, reference: FileRef) -> bytes:
        """Return the reference's bytes. Raise ShardError where they cannot be read or their size is not as listed."""
        with _explain(reference.path):
            if reference.offset is None:
                with open(reference.path, "rb") as file:
                    data = file.read()
            else:
                data = os.pread(self._tar(reference.path), reference.size, reference.offset)
        if len(data) != reference.size:
            raise ShardError(
                f"{reference.path} has changed since the run began ({reference.name}); restore it and rerun the same "
                "command, or start over with --overwrite"
            )
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


_REMEDY = "fix this, then rerun the same command: finished shards are kept"


class TarMember(NamedTuple):
    """A regular file in a tar: `offset` and `size` (bytes) of its data in the outermost file."""

    name: str
    offset: int
    size: int


def list_members(path: Path, within: TarMember | None = None) -> Iterator[TarMember]:
    """Yield the regular files of the tar at `path`, or of its member tar `within`, in the tar's order.

    Raise ShardError for a file that is not an uncompressed tar, and for a tar without an end mark: tarfile alone takes
    an interrupted download for a complete, shorter archive.
    """
    inside = f"{path}/{within.name}" if within else str(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            end = within.offset + within.size if within else size
            if end > size:
                raise ShardError(f"{inside} is cut off: {_DOWNLOAD}")
            file.seek(within.offset if within else 0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.isreg():
                        yield TarMember(member.name, member.offset_data, member.size)
                mark = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
            if mark != bytes(tarfile.BLOCKSIZE) or archive.offset >= end:
                raise ShardError(f"{inside} has no tar end mark: {_DOWNLOAD}")
    except tarfile.ReadError as error:
        raise ShardError(f"{inside} is not an uncompressed tar, or is cut off ({error}): {_DOWNLOAD}") from error


_DOWNLOAD = "download it again, or decompress it first"

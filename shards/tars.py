"""Listing the members of a tar, or of a tar inside a tar, without unpacking: name, place and size of each file."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shards.manifest import ShardError


class Member(NamedTuple):
    """A regular file in a tar: `offset` and `size` in bytes are those of its data in the outermost file."""

    name: str
    offset: int
    size: int


def list_members(path: Path, within: Member | None = None) -> Iterator[Member]:
    """The regular files of the tar at `path`, or of the tar that is its member `within`, in their order.

    Raises ShardError for a file that is no plain tar, and for one that ends before its end mark: an interrupted
    download, which tarfile alone takes for a complete, shorter archive.
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
                        yield Member(member.name, member.offset_data, member.size)
                mark = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
            if mark != bytes(tarfile.BLOCKSIZE) or archive.offset >= end:
                raise ShardError(f"{inside} ends without a tar's end mark: {_DOWNLOAD}")
    except tarfile.ReadError as error:
        raise ShardError(f"{inside} is not an uncompressed tar, or is cut off ({error}): {_DOWNLOAD}") from error


_DOWNLOAD = "download it again, or unpack its compression first"

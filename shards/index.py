"""DALI's index of a tar: where each component of each sample lies. Version 1.2, as DALI's own wds2idx writes it.

The reader trusts it blindly: an index that does not fit its tar gives wrong samples or a crash, never an error. That is
why the manifest keeps its SHA-256 and why shards/verify.py compares it with the tar.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from shards.manifest import ShardError

VERSION = "v1.2"


class Entry(NamedTuple):
    """One component of a sample: `offset` and `size` in bytes are those of its data, `name` is `KEY.COMPONENT`."""

    component: str
    offset: int
    size: int
    name: str

    @property
    def key(self) -> str:
        """The sample's key: what stands before the first dot of the name."""
        return self.name.partition(".")[0]


def format_index(samples: list[list[Entry]]) -> bytes:
    """The index file of a tar that holds these samples, in the tar's order."""
    lines = [f"{VERSION} {len(samples)}"]
    lines += [" ".join(f"{e.component} {e.offset} {e.size} {e.name}" for e in entries) for entries in samples]
    return ("\n".join(lines) + "\n").encode("ascii")


def parse_index(content: bytes, path: Path) -> list[list[Entry]]:
    """What an index says. ShardError, naming `path` and the line, where it is no whole version 1.2 index."""
    return [parse_sample(line, path) for line in index_lines(content, path)]


def index_lines(content: bytes, path: Path) -> list[str]:
    """The index's lines, one a sample, as many as its first line announces."""
    header, *lines = content.decode("ascii", errors="replace").splitlines() or [""]
    version, _, count = header.partition(" ")
    if version != VERSION or not count.isdigit():
        raise ShardError(f"{path} is not a DALI {VERSION} index: {_REMAKE}")
    if len(lines) != int(count):
        raise ShardError(f"{path} announces {count} samples and lists {len(lines)}: {_REMAKE}")
    return lines


def parse_sample(line: str, path: Path) -> list[Entry]:
    """The components of one sample."""
    fields = line.split(" ")
    if len(fields) % 4 or not all(field.isdigit() for field in fields[1::4] + fields[2::4]):
        raise ShardError(f"{path}: {line!r} is not a list of 'component offset size name': {_REMAKE}")
    quarters = zip(fields[0::4], fields[1::4], fields[2::4], fields[3::4], strict=True)
    return [Entry(component, int(offset), int(size), name) for component, offset, size, name in quarters]


_REMAKE = "remake the shards with tools/make_shards.py"

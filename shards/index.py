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
    lines = content.decode("ascii", errors="replace").splitlines()
    header = lines[0].split() if lines else []
    if len(header) != 2 or header[0] != VERSION or not header[1].isdigit():
        raise ShardError(f"{path} is not a DALI {VERSION} index: {_REMAKE}")
    if len(lines) - 1 != int(header[1]):
        raise ShardError(f"{path} announces {header[1]} samples and lists {len(lines) - 1}: {_REMAKE}")
    return [_parse_line(line.split(" "), number, path) for number, line in enumerate(lines[1:], start=2)]


def _parse_line(fields: list[str], number: int, path: Path) -> list[Entry]:
    if len(fields) % 4 or not all(f.isdigit() for f in fields[1::4] + fields[2::4]):
        raise ShardError(f"{path}, line {number}: not a list of 'component offset size name': {_REMAKE}")
    quarters = zip(fields[0::4], fields[1::4], fields[2::4], fields[3::4], strict=True)
    return [Entry(component, int(offset), int(size), name) for component, offset, size, name in quarters]


_REMAKE = "remake the shards with tools/make_shards.py"

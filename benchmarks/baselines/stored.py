"""Where the shards' JPEGs lie, for what reads them one by one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from shards.index import parse_index
from shards.manifest import load_manifest


class Place(NamedTuple):
    """One JPEG inside a tar; `offset` and `size` in bytes."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The JPEG as it is stored."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def places(folder: Path, split: str) -> list[Place]:
    """Every JPEG of a split, by the shards' own indexes: nobody pays for files or for scanning tars."""
    return [
        Place(folder / shard.name, entry.offset, entry.size)
        for shard in load_manifest(folder, split).shards
        for sample in parse_index((folder / shard.index).read_bytes(), folder / shard.index)
        for entry in sample
        if entry.component == "jpg"
    ]

"""Do the shards still hold what their manifest says? A quick look at every training start, a whole one on demand."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

from shards.index import Entry, parse_index
from shards.manifest import Manifest, Shard, ShardError

_REMEDY = "copy it again or remake the split with tools/make_shards.py"


def check_quick(folder: Path, manifest: Manifest) -> None:
    """Raise ShardError at the first shard that is missing, resized, or beside an index that is not its own.

    Reads the small index files whole and two headers of each tar: about 0.1 ms a shard, so that every training start
    can afford it. Damage inside a tar that leaves its size alone is found by `python tools/make_shards.py verify` only.
    """
    for shard in manifest.shards:
        tar, index = folder / shard.name, folder / shard.index
        _check_size(tar, shard.bytes)
        _check_size(index, shard.index_bytes)
        content = index.read_bytes()
        if hashlib.sha256(content).hexdigest() != shard.index_sha256:
            raise ShardError(f"{index} is not the index that belongs to {shard.name} (index_sha256): {_REMEDY}")
        samples = parse_index(content, index)
        if len(samples) != shard.samples:
            raise ShardError(f"{index} lists {len(samples)} samples, the manifest says {shard.samples}: {_REMEDY}")
        _check_ends(tar, shard, [entry for sample in (samples[:1], samples[-1:]) for entry in sample[0]])


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path} is missing, the manifest lists it: {_REMEDY}") from None
    if size != expected:
        raise ShardError(f"{path} has {size:,} bytes, the manifest says {expected:,}: {_REMEDY}")


def _check_ends(tar: Path, shard: Shard, entries: list[Entry]) -> None:
    """A tar swapped for another of the same size still has other members where the index points."""
    with open(tar, "rb") as file:
        for entry in entries:
            header = os.pread(file.fileno(), tarfile.BLOCKSIZE, entry.offset - tarfile.BLOCKSIZE)
            if header[:100].rstrip(b"\0") != entry.name.encode():
                raise ShardError(f"{tar} has no member {entry.name} where {shard.index} points: {_REMEDY}")

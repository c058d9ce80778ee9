"""The manifest: what one split of a shard folder holds. The format's rules are in shards/README.md.

Written by tools/make_shards.py once all shards of a split stand; read by the pipelines before the first batch.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.atomic import write_atomically

SCHEMA_VERSION = 1


class ShardError(ValueError):
    """Shards that cannot be used as they stand. The message names the file, the field and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One tar and its DALI index; `name` and `index` are file names inside the shard folder."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class Column:
    """One label column: tar component `component` (as `cls` or `scene.cls`) is an ASCII index into `classes`."""

    name: str
    component: str
    classes: list[str]


@dataclass(frozen=True)
class Manifest:
    """All of one split. `settings` holds every option that the bytes of the shards depend on."""

    split: str
    seed: int
    samples: int
    bytes: int
    read: int
    rejected: int
    columns: list[Column]
    masks: bool
    """Whether every sample has a segmentation mask (component `mask.png`)."""
    settings: dict[str, Any]
    shards: list[Shard]

    def column(self, name: str) -> Column:
        """The label column of that name; ShardError lists the ones there are."""
        for column in self.columns:
            if column.name == name:
                return column
        raise ShardError(f"split '{self.split}' has no label column '{name}'; it has {[c.name for c in self.columns]}")


MANIFEST = "manifest.json"
"""File name inside a shard folder; one file for all of the folder's splits."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Held while a file that all splits share is rewritten: splits made at the same time do not lose each other.

    What a killed run left half-written of such a file is removed.
    """
    with open(folder / f".{MANIFEST}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for partial in folder.glob(".*.partial"):
            partial.unlink()
        yield


def save_manifest(folder: Path, manifest: Manifest) -> Path:
    """Put this split into the folder's manifest, leaving its other splits as they are."""
    with folder_lock(folder):
        splits = _read_splits(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
        splits[manifest.split] = asdict(manifest)
        return _write_splits(folder, splits)


def remove_split(folder: Path, split: str) -> None:
    """Take the split out of the folder's manifest; its files stay where they are."""
    with folder_lock(folder):
        splits = _read_splits(folder / MANIFEST)
        del splits[split]
        _write_splits(folder, splits)


def list_splits(folder: Path) -> list[str]:
    """The splits that the folder's manifest holds, sorted; none where there is no manifest yet."""
    return sorted(_read_splits(folder / MANIFEST)) if (folder / MANIFEST).exists() else []


def load_manifest(folder: Path, split: str) -> Manifest:
    """Read and check what the folder's manifest says of `split`.

    Raises ShardError where it is missing, unreadable, of another schema, or without that split.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ShardError(f"{path} does not exist: make the shards with tools/make_shards.py, or correct the folder")
    splits = _read_splits(path)
    if split not in splits:
        raise ShardError(f"{path} has no split '{split}'; it has {sorted(splits)}")
    try:
        raw = dict(splits[split])
        shards = [Shard(**shard) for shard in raw.pop("shards")]
        columns = [Column(**column) for column in raw.pop("columns")]
        return Manifest(shards=shards, columns=columns, **raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path}: split '{split}' is malformed ({error}); {_REMAKE}") from error


def _write_splits(folder: Path, splits: dict[str, Any]) -> Path:
    document = {"schema_version": SCHEMA_VERSION, "splits": dict(sorted(splits.items()))}
    write_atomically(folder / MANIFEST, (json.dumps(document, indent=1) + "\n").encode())
    return folder / MANIFEST


_REMAKE = "remake it with tools/make_shards.py"


def _read_splits(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
        version, splits = document["schema_version"], document["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a shard manifest ({error}); {_REMAKE}") from error
    if version != SCHEMA_VERSION:
        raise ShardError(f"{path}: schema_version is {version}, this program reads {SCHEMA_VERSION}; {_REMAKE}")
    return splits

"""The manifest: what one split of a shard folder holds. The format's rules are in shards/README.md.

Written by tools/make_shards.py once all shards of a split stand; read by the pipelines before the first batch.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    schema_version: int = SCHEMA_VERSION

    def column(self, name: str) -> Column:
        """The label column of that name; ShardError lists the ones there are."""
        for column in self.columns:
            if column.name == name:
                return column
        raise ShardError(f"split '{self.split}' has no label column '{name}'; it has {[c.name for c in self.columns]}")


def manifest_path(folder: Path, split: str) -> Path:
    """Several splits may live in one folder: each has its own manifest, named for it."""
    return folder / f"{split}.manifest.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, fsync, rename: a reader sees the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_manifest(folder: Path, manifest: Manifest) -> Path:
    path = manifest_path(folder, manifest.split)
    write_atomically(path, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    return path


def load_manifest(folder: Path, split: str) -> Manifest:
    """Read and check the manifest of `split`; ShardError where it is missing, unreadable or of another schema."""
    path = manifest_path(folder, split)
    if not path.exists():
        others = sorted(p.name.removesuffix(".manifest.json") for p in folder.glob("*.manifest.json"))
        hint = f"splits there: {others}" if others else "make it with tools/make_shards.py"
        raise ShardError(f"{path} does not exist ({hint})")
    try:
        raw = json.loads(path.read_bytes())
        version = raw["schema_version"]
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"{path}: schema_version is {version}, this program reads {SCHEMA_VERSION}; remake the shards"
            )
        shards = [Shard(**shard) for shard in raw.pop("shards")]
        columns = [Column(**column) for column in raw.pop("columns")]
        return Manifest(shards=shards, columns=columns, **raw)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path} is not a shard manifest ({error}); remake it with tools/make_shards.py") from error

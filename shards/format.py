"""Files of a shard folder next to the tars: manifest, DALI indices, list of rejected sources.

shards/README.md specifies the format.

manifest.json describes each split. `iwm shards` writes it once all shards of a split are complete; the
pipelines read it before the first batch.

Each tar has a DALI index (version 1.2, as DALI's wds2idx writes it) with the offset of every component of every sample.
DALI's reader does not check it: an index that does not fit its tar gives wrong samples or a crash, never an error.
Therefore the manifest holds its SHA-256, and shards/verify.py compares it with the tar.

rejected.jsonl has one line, with the reason, for each source that could not become a sample, for all splits.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shards.atomic import write_atomically
from shards.errors import ShardError

SCHEMA_VERSION = 1


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
    """One label column: tar component `component` (`cls` or e.g. `scene.cls`) holds an ASCII index into `classes`."""

    name: str
    component: str
    classes: list[str]


@dataclass(frozen=True)
class Manifest:
    """Description of one split. `settings` holds every option that the bytes of the shards depend on."""

    split: str
    seed: int
    samples: int
    bytes: int
    read: int
    rejected: int
    columns: list[Column]
    masks: bool
    """True where every sample has a segmentation mask (component `mask.png`)."""
    settings: dict[str, Any]
    shards: list[Shard]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of the tars in their order. It identifies the samples and their order."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def column(self, name: str) -> Column:
        """Return the label column `name`. Raise ShardError, which lists the columns, where it does not exist."""
        for column in self.columns:
            if column.name == name:
                return column
        names = [column.name for column in self.columns]
        has = f"has no label column '{name}'; it has {names}" if names else "has no labels"
        raise ShardError(f"split '{self.split}' {has}")


MANIFEST = "manifest.json"
"""File name inside a shard folder; one file describes all splits of the folder."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock on files that all splits share, so that concurrent runs do not overwrite each other's entries.

    Also remove partial versions of such files that a killed run left behind.
    """
    with open(folder / f".{MANIFEST}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for partial in folder.glob(".*.partial"):
            partial.unlink()
        yield


def save_manifest(folder: Path, manifest: Manifest) -> Path:
    """Add or replace this split in the folder's manifest and return the manifest's path; other splits do not change."""
    with folder_lock(folder):
        splits = _read_splits(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
        splits[manifest.split] = asdict(manifest)
        return _write_splits(folder, splits)


def remove_split(folder: Path, split: str) -> None:
    """Remove the split from the folder's manifest; its files are not deleted."""
    with folder_lock(folder):
        splits = _read_splits(folder / MANIFEST)
        del splits[split]
        _write_splits(folder, splits)


def list_splits(folder: Path) -> list[str]:
    """Return the sorted names of the splits in the folder's manifest; an empty list where there is no manifest."""
    return sorted(_read_splits(folder / MANIFEST)) if (folder / MANIFEST).exists() else []


def load_manifest(folder: Path, split: str) -> Manifest:
    """Read and check the entry of `split` in the folder's manifest.

    Raise ShardError where the manifest is missing, unreadable or of another schema, or has no such split.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ShardError(f"{path} does not exist: make the shards with iwm shards, or correct the folder")
    splits = _read_splits(path)
    if split not in splits:
        raise ShardError(
            f"{path} has no split '{split}'; it has {sorted(splits)}: name one of these, or make the split with "
            "iwm shards"
        )
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


_REMAKE = "remake it with iwm shards"


def _read_splits(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
        version, splits = document["schema_version"], document["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a shard manifest ({error}); {_REMAKE}") from error
    if version != SCHEMA_VERSION:
        raise ShardError(f"{path}: schema_version is {version}, this program reads {SCHEMA_VERSION}; {_REMAKE}")
    return splits


VERSION = "v1.2"


class Entry(NamedTuple):
    """One component of a sample: `offset` and `size` of its data (bytes), and its member name `KEY.COMPONENT`."""

    component: str
    offset: int
    size: int
    name: str

    @property
    def key(self) -> str:
        """Key of the sample: the part of the name before the first dot."""
        return self.name.partition(".")[0]


def format_index(samples: list[list[Entry]]) -> bytes:
    """Return the content of the index file for a tar with these samples, which are in the tar's order."""
    return format_index_lines(
        [" ".join(f"{e.component} {e.offset} {e.size} {e.name}" for e in entries) for entries in samples]
    )


def format_index_lines(lines: list[str]) -> bytes:
    """Return the content of the index file with these lines, one per sample (see index_lines)."""
    return ("\n".join([f"{VERSION} {len(lines)}", *lines]) + "\n").encode("ascii")


def parse_index(content: bytes, path: Path) -> list[list[Entry]]:
    """Parse an index. Raise ShardError, which names `path` and the line, where it is not a complete v1.2 index."""
    return [parse_sample(line, path) for line in index_lines(content, path)]


def index_lines(content: bytes, path: Path) -> list[str]:
    """Return the index's lines, one per sample. Raise ShardError for another version or number of lines."""
    header, *lines = content.decode("ascii", errors="replace").splitlines() or [""]
    version, _, count = header.partition(" ")
    if version != VERSION or not count.isdigit():
        raise ShardError(f"{path} is not a DALI {VERSION} index: {_REMAKE_SHARDS}")
    if len(lines) != int(count):
        raise ShardError(f"{path} states {count} samples and lists {len(lines)}: {_REMAKE_SHARDS}")
    return lines


def parse_sample(line: str, path: Path) -> list[Entry]:
    """Parse one line of an index: the components of one sample."""
    fields = line.split(" ")
    if len(fields) % 4 or not all(field.isdigit() for field in fields[1::4] + fields[2::4]):
        raise ShardError(f"{path}: {line!r} is not a list of 'component offset size name': {_REMAKE_SHARDS}")
    quarters = zip(fields[0::4], fields[1::4], fields[2::4], fields[3::4], strict=True)
    return [Entry(component, int(offset), int(size), name) for component, offset, size, name in quarters]


_REMAKE_SHARDS = "remake the shards with iwm shards"


REJECTED = "rejected.jsonl"
"""File name inside a shard folder; one file for all splits of the folder."""


class RejectedSample(Exception):
    """A source file that cannot become a sample. The message is the reason written to rejected.jsonl."""


class RejectionRecord(NamedTuple):
    """A rejected source file and the reason. `path` is relative to the source; in a tar it is `TAR/MEMBER`."""

    path: str
    reason: str


def save_rejections(folder: Path, split: str, rejections: list[RejectionRecord]) -> Path:
    """Replace the split's lines in rejected.jsonl and keep those of other splits. Nothing rejected: an empty file."""
    path = folder / REJECTED
    with folder_lock(folder):
        rows = [row for row in _read(path) if row["split"] != split] if path.exists() else []
        rows += [{"split": split, "path": rejection.path, "reason": rejection.reason} for rejection in rejections]
        rows.sort(key=lambda row: row["split"])
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def load_rejections(folder: Path, split: str) -> list[RejectionRecord]:
    """Return the split's records in rejected.jsonl. Raise ShardError where the file is missing or malformed."""
    rows = _read(folder / REJECTED)
    return [RejectionRecord(row["path"], row["reason"]) for row in rows if row["split"] == split]


def _read(path: Path) -> list[dict[str, str]]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: remake the split with iwm shards") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({field: str(row[field]) for field in ("split", "path", "reason")})
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{path}, line {number}: malformed ({error}); delete this line") from error
    return rows

"""What could not become a sample, and why: rejected.jsonl, a line for each, for all splits of a shard folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from shards.atomic import write_atomically
from shards.manifest import ShardError, folder_lock

REJECTED = "rejected.jsonl"
"""File name inside a shard folder."""


class Rejected(Exception):
    """This source gives no usable sample. The message is the reason, as it goes into rejected.jsonl."""


class Rejection(NamedTuple):
    """`path`: where the source lies, as the source's own listing writes it (inside a tar: `TAR/MEMBER`)."""

    path: str
    reason: str


def save_rejections(folder: Path, split: str, rejections: list[Rejection]) -> Path:
    """Replace the split's lines in rejected.jsonl and keep those of other splits. An empty file says: none."""
    path = folder / REJECTED
    with folder_lock(folder):
        rows = [row for row in _read(path) if row["split"] != split] if path.exists() else []
        rows += [{"split": split, "path": rejection.path, "reason": rejection.reason} for rejection in rejections]
        rows.sort(key=lambda row: row["split"])
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def load_rejections(folder: Path, split: str) -> list[Rejection]:
    """The split's lines of rejected.jsonl. ShardError where the file is missing or malformed."""
    rows = _read(folder / REJECTED)
    return [Rejection(row["path"], row["reason"]) for row in rows if row["split"] == split]


def _read(path: Path) -> list[dict[str, str]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{field: str(row[field]) for field in ("split", "path", "reason")} for row in rows]
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: remake the split with tools/make_shards.py") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} has a line that is no rejected source ({error}); delete that line") from error

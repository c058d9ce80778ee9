"""What a run keeps in OUT until its split is whole: a hidden folder with settings and a record per finished shard."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.atomic import write_atomically
from shards.manifest import Shard, ShardError
from shards.rejection import Rejection


@dataclass(frozen=True)
class Record:
    """What a finished shard leaves behind. `shard` is None where every one of its samples was rejected."""

    shard: Shard | None
    rejections: list[Rejection]


@dataclass(frozen=True)
class Workspace:
    """One split in the making inside the shard folder `out`."""

    out: Path
    split: str

    @property
    def folder(self) -> Path:
        return self.out / f".{self.split}.unfinished"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder and hold it for this process alone; a killed process lets go by itself."""
        with explain_write_errors(self.out):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ShardError(
                    f"another run is making '{self.split}' in {self.out}: wait for it, or stop it"
                ) from None
            yield
        finally:
            with suppress(OSError):  # it holds work to go on from
                self.folder.rmdir()
            os.close(descriptor)

    def shard_name(self, number: int) -> str:
        return f"{self.split}-{number:06d}"

    def load_settings(self) -> dict[str, Any] | None:
        """Settings of the run that was interrupted here; None where there was none."""
        path = self.folder / "settings.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def save_settings(self, settings: dict[str, Any]) -> None:
        write_atomically(self.folder / "settings.json", json.dumps(settings).encode())

    def save_record(self, number: int, record: Record) -> None:
        write_atomically(self.folder / f"{number:06d}.json", json.dumps(asdict(record)).encode())

    def load_record(self, number: int) -> Record | None:
        """The record of a finished shard whose files still have their sizes, else None."""
        path = self.folder / f"{number:06d}.json"
        if not path.exists():
            return None
        raw = json.loads(path.read_bytes())
        record = Record(raw["shard"] and Shard(**raw["shard"]), [Rejection(*row) for row in raw["rejections"]])
        shard = record.shard
        files = [(shard.name, shard.bytes), (shard.index, shard.index_bytes)] if shard else []
        whole = all((self.out / name).exists() and (self.out / name).stat().st_size == size for name, size in files)
        return record if whole else None

    def remove_partials(self) -> None:
        """Remove what killed workers left half-written."""
        for partial in [*self.folder.glob("*.partial"), *self.folder.glob(".*.partial")]:
            partial.unlink(missing_ok=True)

    def shard_files(self) -> list[Path]:
        """Every tar and index in `out` with a name of this split, whoever made it."""
        pattern = re.compile(rf"{re.escape(self.split)}-\d{{6}}\.(tar|idx)")
        return sorted(path for path in self.out.iterdir() if pattern.fullmatch(path.name))

    def clear(self) -> None:
        """Remove everything in the workspace; the folder itself goes when the lock is let go."""
        for path in self.folder.iterdir():
            path.unlink()


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says about writing into a ShardError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room, then run the same command again: finished shards are kept"
        else:
            remedy = "mend that, then run the same command again: finished shards are kept"
        raise ShardError(f"cannot write to {error.filename or folder}: {error.strerror}; {remedy}") from error

"""Shard writing in worker processes, and the working folder of an unfinished split.

A shard is read, converted, written to a tar with its index, and hashed; only then do its files get their final names.
Until the split is complete, OUT has a hidden folder with the settings and one record per finished shard.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from rich.console import Console

from shards.atomic import sync_folder, unique_name, write_atomically
from shards.errors import ShardError
from shards.format import Column, Entry, RejectedSample, RejectionRecord, Shard, format_index
from shards.images import ImageOptions, to_baseline_jpeg, to_png_mask
from shards.listing import TarReader
from shards.samples import Sample
from shards.urls import DISK_FULL
from shards.workers import ProgressCount


@dataclass(frozen=True)
class ShardRecord:
    """Record of a finished shard. `shard` is None where all of its samples were rejected."""

    shard: Shard | None
    rejections: list[RejectionRecord]


def shard_file_pattern(split: str) -> re.Pattern[str]:
    """Return the pattern of the names of a split's tars and indices."""
    return re.compile(rf"{re.escape(split)}-\d{{6}}\.(tar|idx)")


@contextmanager
def locked_folder(folder: Path, busy: str) -> Iterator[None]:
    """Create a folder of unfinished work and lock it for this process; at the end remove it if it is empty.

    The system releases the lock of a killed process. Raise ShardError with the message `busy` where another process has
    it.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(busy) from None
        yield
    finally:
        with suppress(OSError):  # not empty: it has finished work to resume from; or removed
            folder.rmdir()
        os.close(descriptor)


@dataclass(frozen=True)
class SplitWorkdir:
    """Working folder of an unfinished split inside the shard folder `out`."""

    out: Path
    split: str

    @property
    def folder(self) -> Path:
        return self.out / f".{self.split}.unfinished"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder and lock it for this process. Raise ShardError where another process has it."""
        with locked_folder(self.folder, f"another run is making '{self.split}' in {self.out}: wait for it, or stop it"):
            yield

    def shard_name(self, number: int) -> str:
        return f"{self.split}-{number:06d}"

    def load_settings(self) -> dict[str, Any] | None:
        """Return the settings of the run that was interrupted here; None where there was none."""
        path = self.folder / "settings.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def save_settings(self, settings: dict[str, Any]) -> None:
        write_atomically(self.folder / "settings.json", json.dumps(settings).encode())

    def save_record(self, number: int, record: ShardRecord) -> None:
        write_atomically(self.folder / f"{number:06d}.json", json.dumps(asdict(record)).encode())

    def load_record(self, number: int) -> ShardRecord | None:
        """Return the record of a finished shard whose files still have their sizes, else None."""
        path = self.folder / f"{number:06d}.json"
        if not path.exists():
            return None
        raw = json.loads(path.read_bytes())
        record = ShardRecord(
            raw["shard"] and Shard(**raw["shard"]), [RejectionRecord(*row) for row in raw["rejections"]]
        )
        shard = record.shard
        files = [(shard.name, shard.bytes), (shard.index, shard.index_bytes)] if shard else []
        whole = all((self.out / name).exists() and (self.out / name).stat().st_size == size for name, size in files)
        return record if whole else None

    def remove_partials(self) -> None:
        """Remove the partial files of killed workers."""
        for partial in [*self.folder.glob("*.partial"), *self.folder.glob(".*.partial")]:
            partial.unlink(missing_ok=True)

    def shard_files(self) -> list[Path]:
        """Return the paths of all tars and indices in `out` named after this split, from any run."""
        pattern = shard_file_pattern(self.split)
        return sorted(path for path in self.out.iterdir() if pattern.fullmatch(path.name))

    def clear(self) -> None:
        """Delete all files in the folder; the folder itself is deleted when the lock is released."""
        for path in self.folder.iterdir():
            path.unlink()


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Convert an OSError about writing to a ShardError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            remedy = "free disk space, then rerun the same command: finished shards are kept"
        else:
            remedy = "fix this, then rerun the same command: finished shards are kept"
        raise ShardError(f"cannot write to {error.filename or folder}: {error.strerror}; {remedy}") from error


def warn_of_small_disk(folder: Path, needed: int, console: Console, remedy: str = "") -> None:
    """Print a warning where the disk of the folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        console.print(
            f"about {needed / 1e9:.1f} GB to write, only {free / 1e9:.1f} GB free on the disk of {folder}{remedy}",
            style="yellow",
        )


REPORT_EVERY = 0.2
"""Time between two progress reports from inside a shard (seconds)."""


@dataclass(frozen=True)
class ShardJob:
    """Parameters that all shards of a split share."""

    workspace: SplitWorkdir
    columns: list[Column]
    rules: ImageOptions


class ShardTask(NamedTuple):
    """Shard `number` of the plan and its samples."""

    number: int
    samples: list[Sample]


def write_shard(job: ShardJob, task: ShardTask) -> Generator[ProgressCount, None, None]:
    """Write one shard to OUT, and its record to the working folder; yield the progress since the last report.

    Raise ShardError for a source file that cannot be read and for a write error.
    """
    workspace, name = job.workspace, job.workspace.shard_name(task.number)
    # Two nodes may write the same shard at once, each to its own files.
    attempt = unique_name()
    partial_tar, partial_index = (workspace.folder / f"{name}.{kind}.{attempt}.partial" for kind in ("tar", "idx"))
    rejections: list[RejectionRecord] = []
    index: list[list[Entry]] = []
    with explain_write_errors(workspace.out):
        with open(partial_tar, "wb", buffering=1 << 20) as file:
            tar = TarWriter(file)
            yield from _fill(tar, job, task, index, rejections)
            tar.close()
        if index:
            content = format_index(index)
            with open(partial_index, "wb") as file:
                file.write(content)
                _sync(file)
            shard = Shard(
                name=f"{name}.tar",
                samples=len(index),
                bytes=tar.size,
                sha256=tar.sha256.hexdigest(),
                index=f"{name}.idx",
                index_bytes=len(content),
                index_sha256=hashlib.sha256(content).hexdigest(),
            )
            os.replace(partial_tar, workspace.out / shard.name)
            os.replace(partial_index, workspace.out / shard.index)
            sync_folder(workspace.out)
        workspace.save_record(task.number, ShardRecord(shard if index else None, rejections))


def _fill(
    tar: TarWriter, job: ShardJob, task: ShardTask, index: list[list[Entry]], rejections: list[RejectionRecord]
) -> Generator[ProgressCount, None, None]:
    done, rejected, reported = 0, 0, time.monotonic()
    indices = [{name: str(place) for place, name in enumerate(column.classes)} for column in job.columns]
    with TarReader() as reader:
        reader.prefetch([sample.image for sample in task.samples])
        for sample in task.samples:
            try:
                components = _components(job, indices, sample, reader)
            except RejectedSample as reason:
                rejections.append(RejectionRecord(sample.image.name, str(reason)))
                rejected += 1
            else:
                index.append([tar.add(sample.key, component, data) for component, data in components.items()])
            done += 1
            if time.monotonic() - reported > REPORT_EVERY:
                yield ProgressCount(done, rejected)
                done, rejected, reported = 0, 0, time.monotonic()
    yield ProgressCount(done, rejected)


def _components(job: ShardJob, indices: list[dict[str, str]], sample: Sample, reader: TarReader) -> dict[str, bytes]:
    """Return component → content, in the order of writing. Raise RejectedSample for an unusable image or mask."""
    image = to_baseline_jpeg(reader.read(sample.image), job.rules)
    components = {"jpg": image.jpeg}
    for column, index, label in zip(job.columns, indices, sample.labels, strict=True):
        components[column.component] = index[label].encode()
    if sample.mask:
        try:
            components["mask.png"] = to_png_mask(reader.read(sample.mask), image)
        except RejectedSample as reason:
            raise RejectedSample(f"its mask {sample.mask.name}: {reason}") from reason
    return components


class TarWriter:
    """Writer of tars whose bytes depend on names and contents only (no times, no owners), hashed during writing."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def add(self, key: str, component: str, data: bytes) -> Entry:
        """Append one component of a sample and return its index entry."""
        info = tarfile.TarInfo(f"{key}.{component}")
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        entry = Entry(component, self.size, len(data), info.name)
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return entry

    def close(self) -> None:
        """Write the end mark, padded to a whole record as tar does, and fsync the file."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        _sync(self.file)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

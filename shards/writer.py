"""Writing one shard: read, normalise, tar, index, hash, and only then its final name. Runs in a worker process."""

from __future__ import annotations

import hashlib
import os
import tarfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from shards.atomic import sync_folder
from shards.images import ImageRules, normalise, normalise_mask
from shards.index import Entry, format_index
from shards.listing import Sample
from shards.manifest import Column, Shard
from shards.pool import Tally
from shards.reading import Reader
from shards.rejection import Rejected, Rejection
from shards.workspace import Record, Workspace, explain_write_errors

REPORT_EVERY = 0.2
"""Seconds between two reports from inside a shard."""


@dataclass(frozen=True)
class Job:
    """What all shards of a split have in common."""

    workspace: Workspace
    columns: list[Column]
    rules: ImageRules


class ShardTask(NamedTuple):
    """Shard number `number` of the plan, made of these samples."""

    number: int
    samples: list[Sample]


def write_shard(job: Job, task: ShardTask) -> Generator[Tally, None, None]:
    """Make one shard and leave its record in the workspace; yields what was done since the last tally.

    Raises ShardError for a source file that cannot be read and for a disk that cannot be written.
    """
    workspace, name = job.workspace, job.workspace.shard_name(task.number)
    partial_tar, partial_index = (workspace.folder / f"{name}.{kind}.{os.getpid()}.partial" for kind in ("tar", "idx"))
    rejections: list[Rejection] = []
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
        workspace.save_record(task.number, Record(shard if index else None, rejections))


def _fill(
    tar: TarWriter, job: Job, task: ShardTask, index: list[list[Entry]], rejections: list[Rejection]
) -> Generator[Tally, None, None]:
    done, rejected, reported = 0, 0, time.monotonic()
    indices = [{name: str(place) for place, name in enumerate(column.classes)} for column in job.columns]
    with Reader() as reader:
        reader.prefetch([sample.image for sample in task.samples])
        for sample in task.samples:
            try:
                components = _components(job, indices, sample, reader)
            except Rejected as reason:
                rejections.append(Rejection(sample.image.name, str(reason)))
                rejected += 1
            else:
                index.append([tar.add(sample.key, component, data) for component, data in components.items()])
            done += 1
            if time.monotonic() - reported > REPORT_EVERY:
                yield Tally(done, rejected)
                done, rejected, reported = 0, 0, time.monotonic()
    yield Tally(done, rejected)


def _components(job: Job, indices: list[dict[str, str]], sample: Sample, reader: Reader) -> dict[str, bytes]:
    """Component → content, in the order in which they are written."""
    image = normalise(reader.read(sample.image), job.rules)
    components = {"jpg": image.jpeg}
    for column, index, label in zip(job.columns, indices, sample.labels, strict=True):
        components[column.component] = index[label].encode()
    if sample.mask:
        try:
            components["mask.png"] = normalise_mask(reader.read(sample.mask), image)
        except Rejected as reason:
            raise Rejected(f"its mask {sample.mask.name}: {reason}") from reason
    return components


class TarWriter:
    """A tar whose bytes depend on names and contents only (no times, no owners), hashed while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def add(self, key: str, component: str, data: bytes) -> Entry:
        """Append one component of a sample."""
        info = tarfile.TarInfo(f"{key}.{component}")
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        entry = Entry(component, self.size, len(data), info.name)
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return entry

    def close(self) -> None:
        """Write the end mark, filled up to a whole record as tar does, and wait until all of it is on the disk."""
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

"""Staging of remote tars: they are copied to a folder on a disk, and listed and read there as local tars are.

A global shuffle reads samples in random order, which a stream cannot give and a store answers with one request per
sample. So each tar is read once, from its beginning to its end, before the shards are planned.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from threading import Event, Lock
from types import TracebackType
from typing import Any
from uuid import uuid4

from rich.console import Console

from shards.errors import ShardError
from shards.format import MANIFEST
from shards.listing import list_members
from shards.sources.remote_tars import PIPE, RemoteTar, manifest_beside
from shards.transfer_progress import TransferProgress
from shards.urls import download
from shards.writer import explain_write_errors, locked_folder, warn_of_small_disk

COPIES_AT_ONCE = 8
"""Number of tars that are copied at the same time."""

_JOURNAL = "staged.jsonl"


@dataclass(frozen=True)
class StagingFolder:
    """Folder of the copies of a source's tars, and a journal of those that are whole."""

    path: Path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the folder and lock it for this process. Raise ShardError where another process has it."""
        busy = f"another run copies its source to {self.path}: wait for it, or use another --staging"
        with locked_folder(self.path, busy):
            yield

    def stage(self, tars: list[RemoteTar], console: Console) -> list[Path]:
        """Copy the tars that are not here yet; return the paths of all, in order.

        Raise ShardError for a tar that cannot be read, is cut off, or has another size than its server tells, and for
        a command that fails. Tars that are whole stay for the next attempt.
        """
        with explain_write_errors(self.path):
            done = self._whole(tars)
            self._remove_others(done)
            todo = [tar for tar in tars if tar not in done]
            self._announce(tars, todo, console)
            if todo:
                self._copy(todo, console)
            manifest = manifest_beside(tars)
            if manifest:
                download(manifest, self.path / MANIFEST)
        return [self.path / tar.name for tar in tars]

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path)

    def _whole(self, tars: list[RemoteTar]) -> set[RemoteTar]:
        """Return the tars whose copies are here and whole, and whose server does not tell of another content since."""
        journal = self.path / _JOURNAL
        known: dict[RemoteTar, int] = {}
        for line in journal.read_text().splitlines() if journal.exists() else []:
            # A line can be cut off by a power cut: its tar is copied again.
            with suppress(ValueError):
                *tar, copied = json.loads(line)
                known[RemoteTar(*tar)] = copied
        return {
            tar
            for tar in tars
            if (self.path / tar.name).exists() and (self.path / tar.name).stat().st_size == known.get(tar)
        }

    def _remove_others(self, kept: set[RemoteTar]) -> None:
        """Delete files that belong to no whole tar: parts of tars, and those of another source."""
        names = {self.path / tar.name for tar in kept} | {self.path / _JOURNAL}
        for path in self.path.rglob("*"):
            if path.is_file() and path not in names:
                path.unlink()

    def _announce(self, tars: list[RemoteTar], todo: list[RemoteTar], console: Console) -> None:
        unknown = sum(tar.size is None for tar in todo)
        needed = sum(tar.size or 0 for tar in todo)
        there = f", {len(tars) - len(todo):,} more are there" if len(todo) < len(tars) else ""
        size = f"{needed / 1e6:,.1f} MB" + (f" and {unknown:,} of unknown size" if unknown else "")
        console.print(f"copying {len(todo):,} tars ({size}{there}) to {self.path}, which is deleted after success")
        warn_of_small_disk(self.path, needed, console, "; --staging names a folder on another")

    def _copy(self, todo: list[RemoteTar], console: Console) -> None:
        total = None if any(tar.size is None for tar in todo) else sum(tar.size or 0 for tar in todo)
        with (
            TransferProgress("copying", len(todo), total, console) as progress,
            ThreadPool(min(COPIES_AT_ONCE, len(todo))) as pool,
            TarCopies(self.path) as copies,
        ):
            results = [pool.apply_async(copies.copy, (tar,)) for tar in todo]
            ready: list[AsyncResult[None]] = []
            while len(ready) < len(results):
                time.sleep(0.1)
                ready = [result for result in results if result.ready()]
                for result in ready:
                    result.get()
                progress.update(copies.bytes, len(ready))


class TarCopies:
    """Copies of tars to a folder. Use it as a context manager: at its end the copies in other threads stop soon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        """Number of bytes copied so far."""
        self._ended = Event()
        self._lock = Lock()
        self._commands: set[Any] = set()

    def __enter__(self) -> TarCopies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for pipe in set(self._commands):
            pipe.proc.kill()

    def copy(self, tar: RemoteTar) -> None:
        """Copy a tar under a temporary name, check it, rename it, and write it into the journal."""
        path = self.folder / tar.name
        partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
        self._report(0)
        with explain_write_errors(self.folder):
            path.parent.mkdir(exist_ok=True)
            if tar.location.startswith(PIPE):
                self._run(tar.location, partial)
            else:
                download(tar.location, partial, self._report)
            size = partial.stat().st_size
            if tar.size is not None and size != tar.size:
                raise ShardError(
                    f"{tar.location}: {size:,} bytes came, its server tells of {tar.size:,}; rerun the same command"
                )
            _check_whole(tar, partial)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            with self._lock, open(self.folder / _JOURNAL, "a") as journal:
                journal.write(json.dumps([*tar, size]) + "\n")

    def _report(self, added: int) -> None:
        if self._ended.is_set():
            raise ShardError("stopped")
        with self._lock:
            self.bytes += added

    def _run(self, location: str, path: Path) -> None:
        """Write a command's output to a file. Raise ShardError where it ends with another status than 0."""
        pipe = importlib.import_module("webdataset.gopen").gopen(location, bufsize=0)
        self._commands.add(pipe)
        try:
            with open(path, "wb") as file:
                while True:
                    self._report(0)
                    if not select.select([pipe.stream], [], [], 0.2)[0]:
                        continue
                    data = os.read(pipe.stream.fileno(), 1 << 20)
                    if not data:
                        break
                    file.write(data)
                    self._report(len(data))
            # gopen's own check passes over some statuses, such as that of a broken pipe.
            status = pipe.proc.wait()
        finally:
            pipe.proc.kill()
            pipe.stream.close()
            pipe.proc.wait()
            self._commands.remove(pipe)
        if status != 0:
            raise ShardError(
                f"{location} ended with status {status} after {path.stat().st_size:,} bytes; correct the command, "
                "then rerun: whole tars are kept"
            )


def _check_whole(tar: RemoteTar, path: Path) -> None:
    """Raise ShardError where the copy is no tar with an end mark."""
    try:
        for _ in list_members(path):
            pass
    except ShardError as error:
        raise ShardError(str(error).replace(str(path), tar.location)) from error

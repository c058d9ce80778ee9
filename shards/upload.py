"""Upload of a split's shards to a URL while further shards are made, and of its manifest after all of them.

Shards are made in a local work folder, in which a run resumes as in any shard folder, and stay there until the split is
whole at the URL. A journal in that folder says which files have arrived.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Generator
from contextlib import closing, suppress
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from rich.console import Console

from shards.format import MANIFEST, REJECTED, Manifest, Shard, list_splits, load_rejections, remove_split
from shards.remote_folder import RemoteFolder
from shards.transfer_progress import TransferProgress
from shards.urls import RemoteFile, describe_file, folder_name, join, upload
from shards.workers import ProgressCount
from shards.writer import SplitWorkdir

UPLOADS_AT_ONCE = 4
"""Number of files that are uploaded at the same time."""
LOOK_EVERY = 0.2
"""Time between two looks for finished shards (seconds)."""

_MD5 = re.compile(r"[0-9a-f]{32}")


class SplitUpload:
    """Upload of one split in threads. Use it as a context manager: at its end no further file is begun."""

    def __init__(self, workspace: SplitWorkdir, remote: RemoteFolder) -> None:
        self.workspace = workspace
        self.remote = remote
        self._journal = _journal(workspace, remote)
        self._arrived = self._read_journal()
        self._files: dict[str, RemoteFile] = {}
        self._pool = ThreadPool(UPLOADS_AT_ONCE)
        self._results: dict[str, AsyncResult[int]] = {}
        self._records: set[Path] = set()
        self._lock = Lock()

    def __enter__(self) -> SplitUpload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.terminate()

    def existing_split(self, settings: dict[str, Any], overwrite: bool) -> Manifest | None:
        """Return the manifest of a split that is whole at the URL; see RemoteFolder.existing_split."""
        made = self.workspace.load_settings() is not None or self.workspace.split in list_splits(self.workspace.out)
        begun = made or bool(self._arrived)
        manifest = self.remote.existing_split(self.workspace.split, settings, begun, overwrite)
        self._files = self.remote.files()
        return manifest

    def beside(self, reports: Generator[ProgressCount, None, None]) -> Generator[ProgressCount, None, None]:
        """Yield the reports of making shards, and upload the shards that are finished meanwhile.

        Raise ShardError soon after an upload has failed.
        """
        with closing(reports):
            looked = 0.0
            for report in reports:
                if time.monotonic() - looked > LOOK_EVERY:
                    looked = time.monotonic()
                    self._add_finished()
                    self._uploaded()
                yield report

    def finish(self, manifest: Manifest, console: Console) -> None:
        """Upload what is missing, then the rejections, then the manifest. Raise ShardError where that fails."""
        for shard in manifest.shards:
            self._add(shard)
        total = sum(shard.bytes + shard.index_bytes for shard in manifest.shards)
        with TransferProgress("uploading", len(manifest.shards), total, console) as progress:
            while len(sizes := self._uploaded()) < len(self._results):
                progress.update(sum(sizes), len(sizes))
                time.sleep(0.1)
        self.remote.publish(manifest, load_rejections(self.workspace.out, manifest.split))
        self._journal.unlink(missing_ok=True)
        console.print(f"{manifest.split}: uploaded to {self.remote.url}")

    def _add_finished(self) -> None:
        for path in set(self.workspace.folder.glob("[0-9]*.json")) - self._records:
            self._records.add(path)
            record = self.workspace.load_record(int(path.stem))
            if record and record.shard:
                self._add(record.shard)

    def _add(self, shard: Shard) -> None:
        if shard.name not in self._results:
            self._results[shard.name] = self._pool.apply_async(self._send, (shard,))

    def _uploaded(self) -> list[int]:
        """Return the sizes of the shards that are whole at the URL (bytes); raise the error of one that failed."""
        return [result.get() for result in self._results.values() if result.ready()]

    def _send(self, shard: Shard) -> int:
        for name, size, sha256 in (
            (shard.name, shard.bytes, shard.sha256),
            (shard.index, shard.index_bytes, shard.index_sha256),
        ):
            path, url = self.workspace.out / name, join(self.remote.url, name)
            if not self._is_whole(path, size, sha256):
                upload(path, url)
                line = json.dumps([name, sha256, describe_file(url)[1]])
                with self._lock, open(self._journal, "a") as journal:
                    journal.write(line + "\n")
        return shard.bytes + shard.index_bytes

    def _is_whole(self, path: Path, size: int, sha256: str) -> bool:
        """Return True where the file at the URL has the size, and is the one that was uploaded or has the same MD5."""
        there = self._files.get(path.name)
        if there is None or there.size != size:
            return False
        if self._arrived.get(path.name) == (sha256, there.checksum):
            return True
        if not _MD5.fullmatch(there.checksum):
            return False
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest() == there.checksum

    def _read_journal(self) -> dict[str, tuple[str, str]]:
        arrived = {}
        for line in self._journal.read_text().splitlines() if self._journal.exists() else []:
            # A line can be cut off by a power cut: its file is uploaded again.
            with suppress(ValueError):
                name, sha256, checksum = json.loads(line)
                arrived[name] = (sha256, checksum)
        return arrived


def _journal(workspace: SplitWorkdir, remote: RemoteFolder) -> Path:
    return remote.mirror / f"uploaded-{workspace.split}.jsonl"


def discard_local(workspace: SplitWorkdir, remote: RemoteFolder) -> None:
    """Delete the split's files in the locked work folder, and the files of all splits where it was the last."""
    out = workspace.out
    _journal(workspace, remote).unlink(missing_ok=True)
    for path in workspace.shard_files():
        path.unlink()
    workspace.clear()
    if workspace.split in list_splits(out):
        remove_split(out, workspace.split)
    if not list_splits(out):
        for name in (MANIFEST, REJECTED, f".{MANIFEST}.lock"):
            (out / name).unlink(missing_ok=True)


def remove_unused(work: Path, remote: RemoteFolder) -> None:
    """Delete what no run can resume from, also the work folder where nothing else is in it."""
    if work.exists() and not [*remote.mirror.glob("uploaded-*"), *work.glob(".*.unfinished")]:
        shutil.rmtree(remote.mirror, ignore_errors=True)
        if not any(work.iterdir()):
            work.rmdir()


def default_work_dir(url: str) -> Path:
    """Return the work folder of a URL in the current folder: the same command finds it again."""
    return Path(f"iwm-work-{folder_name(url)}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:8]}")

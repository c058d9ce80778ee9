"""Shard folder at a URL, with a local copy of the files that all of its splits share."""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from shards.atomic import write_atomically
from shards.errors import ShardError
from shards.existing_split import compare_finished, refusal
from shards.format import (
    MANIFEST,
    REJECTED,
    Manifest,
    RejectionRecord,
    list_splits,
    load_manifest,
    remove_split,
    save_manifest,
    save_rejections,
)
from shards.urls import (
    REQUESTS_AT_ONCE,
    RemoteFile,
    delete,
    exists,
    file_size,
    is_web,
    join,
    list_files,
    read_file,
    upload,
)
from shards.writer import shard_file_pattern

REMEDY = "upload it again: rerun the command that made the shards, or remake the split"


@dataclass(frozen=True)
class RemoteFolder:
    """Shard folder at `url`. `mirror` is a local folder with its manifest and its list of rejections.

    Like a local folder it is whole as far as its manifest says: the manifest is written last, and the entry of a split
    is removed before any of its files.
    """

    url: str
    mirror: Path

    def fetch(self) -> None:
        """Bring the mirror to the state of the URL. Raise ShardError where that cannot be read."""
        self.mirror.mkdir(parents=True, exist_ok=True)
        for name in (MANIFEST, REJECTED):
            if exists(join(self.url, name)):
                write_atomically(self.mirror / name, read_file(join(self.url, name)))
            else:
                (self.mirror / name).unlink(missing_ok=True)

    def files(self, wanted: Iterable[str] = ()) -> dict[str, RemoteFile]:
        """Return the files at the URL by name; none where there is no such folder yet.

        wanted: names to ask for at a web server, which does not list folders.
        """
        if is_web(self.url):
            urls = [join(self.url, name) for name in wanted]
            with ThreadPool(REQUESTS_AT_ONCE) as pool:
                found = pool.map(
                    lambda url: RemoteFile(url, file_size(url)) if exists(url) else None, urls, chunksize=1
                )
            return {file.url.rpartition("/")[2]: file for file in found if file}
        if not exists(self.url):
            return {}
        return {file.url.rpartition("/")[2]: file for file in list_files(self.url)}

    def existing_split(self, split: str, settings: dict[str, Any], begun: bool, overwrite: bool) -> Manifest | None:
        """Return the manifest of a split that is whole at the URL; None where it is to be made or uploaded.

        begun: True where shards of the split that wait for their upload, or were uploaded, are in the work folder.
        Raise ShardError where the URL has the split with other settings, damaged, or without a manifest; with
        `overwrite`, delete it instead.
        """
        files = self.files()
        strays = sorted(filter(shard_file_pattern(split).fullmatch, files))
        try:
            if split in list_splits(self.mirror):
                manifest = load_manifest(self.mirror, split)
                compare_finished(manifest, settings, self.url)
                problems = size_problems(self.url, manifest, files)
                if problems:
                    raise ShardError(problems[0])
                return manifest
            if strays and not begun:
                raise ShardError(
                    f"{join(self.url, strays[0])} belongs to no manifest: rerun the interrupted command with its "
                    "--work-dir, or in its current folder"
                )
        except ShardError as error:
            if not overwrite:
                raise refusal(error) from None
            self._remove(split, strays)
        return None

    def _remove(self, split: str, files: list[str]) -> None:
        with self._lock():
            self.fetch()
            if split in list_splits(self.mirror):
                remove_split(self.mirror, split)
                upload(self.mirror / MANIFEST, join(self.url, MANIFEST))
            for name in files:
                delete(join(self.url, name))

    def publish(self, manifest: Manifest, rejections: list[RejectionRecord]) -> None:
        """Add or replace a split in the manifest at the URL, after its rejections; other splits do not change.

        Files of the split that the manifest does not list are deleted. Raise ShardError where one that it lists is not
        there. Splits may be published at the same time by processes with the same mirror, not by different machines.
        """
        files = self.files()
        problems = size_problems(self.url, manifest, files)
        if problems:
            raise ShardError(problems[0])
        listed = {name for shard in manifest.shards for name in (shard.name, shard.index)}
        with self._lock():
            for name in filter(shard_file_pattern(manifest.split).fullmatch, files.keys() - listed):
                delete(join(self.url, name))
            self.fetch()
            if (self.mirror / record_name(manifest.split)).exists():
                upload(self.mirror / record_name(manifest.split), join(self.url, record_name(manifest.split)))
            upload(save_rejections(self.mirror, manifest.split, rejections), join(self.url, REJECTED))
            upload(save_manifest(self.mirror, manifest), join(self.url, MANIFEST))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.mirror.mkdir(parents=True, exist_ok=True)
        with open(self.mirror / "publish.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def record_name(split: str) -> str:
    """Return the name of the hidden file in a shard folder that describes the remote source of a split."""
    return f".{split}.source.json"


def size_problems(url: str, manifest: Manifest, files: dict[str, RemoteFile]) -> list[str]:
    """Compare the sizes of a split's files with those of a listing; return the problems."""
    problems = []
    for shard in manifest.shards:
        for name, size in ((shard.name, shard.bytes), (shard.index, shard.index_bytes)):
            if name not in files:
                problems.append(f"{join(url, name)} is missing, but the manifest lists it: {REMEDY}")
            elif files[name].size != size:
                problems.append(f"{join(url, name)} has {files[name].size:,} bytes, expected {size:,}: {REMEDY}")
    return problems

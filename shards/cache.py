"""Local copies of the shards of a folder at a URL, for all processes of a machine.

    CACHE/NAME-HASH/   manifest.json  SPLIT-000000.tar .idx …  staged/SPLIT-000000.tar  download.lock  use.lock

HASH is that of the manifest, so shards that were made again get a folder of their own. A tar has its full size from the
beginning, without content: DALI opens all tars of a split before it reads the first one. Its content counts once its
SHA-256 is the manifest's: then `staged` has a file of its name, whose time is that of its last use.
"""

from __future__ import annotations

import hashlib
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple

from shards.atomic import write_atomically
from shards.errors import ShardError
from shards.format import MANIFEST, Manifest, Shard
from shards.shard_locks import ShardLocks
from shards.urls import BLOCK, folder_name, is_url, join, read_file, read_range
from shards.writer import explain_write_errors

STAGED = "staged"
"""Folder in a cache with an empty file for each staged tar."""
INDEX_REQUESTS = 16
"""Number of indexes that are fetched at the same time."""


class Source(NamedTuple):
    """URL of a cache's shards, and the bytes that its tars may take; None: no limit."""

    url: str
    limit: float | None


_SOURCES: dict[Path, Source] = {}
"""Caches that this process has opened, by folder."""


def local_folder(location: str, cache: Path | None, limit_gb: float | None) -> Path:
    """Return the folder of the shards at a location: a path, or a URL, whose shards will be staged below `cache`.

    Of a URL the manifest is fetched. Raise ShardError where that fails. cache: None for the user's cache folder.
    limit_gb: size that the tars of the URL may take (10⁹ bytes); None: no limit.
    """
    if not is_url(location):
        return Path(location)
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "iwm")
    for folder, source in _SOURCES.items():
        if source.url == location and folder.parent == cache:
            return folder
    manifest = read_file(join(location, MANIFEST))
    folder = cache / f"{folder_name(location)}-{_digest(manifest)[:16]}"
    with explain_write_errors(folder):
        (folder / STAGED).mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            write_atomically(folder / MANIFEST, manifest)
    _SOURCES[folder] = Source(location, None if limit_gb is None else limit_gb * 1e9)
    return folder


def source_of(folder: Path) -> Source | None:
    """Return the source of a folder that local_folder has returned for a URL; None for any other folder."""
    return _SOURCES.get(folder)


def location_of(folder: Path) -> str:
    """Return where the shards of a folder are from: the URL of a cache, else the folder itself."""
    source = source_of(folder)
    return source.url if source else str(folder)


class StagingStopped(Exception):
    """Staging that its owner stopped."""


class SplitCache:
    """Local copies of one split's shards. Every loader has its own."""

    def __init__(self, folder: Path, source: Source, manifest: Manifest) -> None:
        """Open the split's part of a cache and fetch its indexes. Raise ShardError where that fails."""
        self.folder, self.url, self.limit, self.shards = folder, source.url, source.limit, manifest.shards
        if source.limit is not None:
            _allow_open_files(manifest)
        self._downloads = ShardLocks(folder / f"{manifest.split}.download.lock")
        self._uses = ShardLocks(folder / f"{manifest.split}.use.lock")
        self._used: set[int] = set()
        # Locks of the kernel do not exclude the threads of one loader from each other.
        self._evicting = Lock()
        self._fetching = [Lock() for _ in self.shards]
        with ThreadPoolExecutor(INDEX_REQUESTS) as requests:
            for _ in requests.map(self._prepare, range(len(self.shards))):
                pass

    def is_staged(self, number: int) -> bool:
        """Return True where the shard is here, verified."""
        return self._mark(number).exists()

    @property
    def description(self) -> str:
        """One line on what is copied from where to where."""
        size = sum(shard.bytes for shard in self.shards) / 1e9
        limit = "" if self.limit is None else f", at most {self.limit / 1e9:g} GB at a time"
        return f"shards of {self.url} ({size:,.3g} GB) are copied to {self.folder} as they are needed{limit}"

    def staged_share(self) -> float:
        """Return the share of the split's shards that are here (0 to 1)."""
        names = {mark.name for mark in (self.folder / STAGED).iterdir()}
        return sum(shard.name in names for shard in self.shards) / len(self.shards)

    def use(self, number: int, stop: Event) -> int:
        """Stage the shard unless it is here, and keep it from being evicted; return the bytes fetched.

        Only one process fetches a shard, the others wait for it. One with another hash than the manifest's is fetched
        once more. Raise ShardError where it differs again or cannot be fetched, StagingStopped once `stop` is set.
        """
        with self._evicting:
            self._uses.share(number)
            self._used.add(number)
        with self._fetching[number], self._downloads.held(number):
            if self.is_staged(number):
                os.utime(self._mark(number))
                return 0
            with explain_write_errors(self.folder):
                return self._fetch(number, stop)

    def done_with(self, number: int) -> None:
        """Allow the shard to be evicted, as far as this loader is concerned."""
        with self._evicting:
            self._used.discard(number)
            self._uses.release(number)

    def done(self) -> None:
        """Allow all shards to be evicted, as far as this loader is concerned."""
        for number in list(self._used):
            self.done_with(number)

    def make_room(self, number: int, fetching: int) -> bool:
        """Evict shards that no loader uses, the least recently used first, until the shard fits into the limit.

        Return False where it does not fit. fetching: bytes of shards that are being staged.
        """
        if self.limit is None or self.is_staged(number):
            return True
        with self._evicting:
            return self._evict_for(self.shards[number].bytes + fetching)

    def _evict_for(self, needed: int) -> bool:
        """Evict shards until so many bytes more are within the limit; return False where they cannot be."""
        staged = {mark.name: mark.stat().st_mtime for mark in (self.folder / STAGED).iterdir()}
        size = sum((self.folder / name).stat().st_size for name in staged)
        evictable = [i for i, shard in enumerate(self.shards) if shard.name in staged and i not in self._used]
        evictable.sort(key=lambda i: staged[self.shards[i].name], reverse=True)
        while self.limit is not None and size + needed > self.limit:
            if not evictable:
                return False
            evicted = evictable.pop()
            size -= self.shards[evicted].bytes if self._evict(evicted) else 0
        return True

    def _mark(self, number: int) -> Path:
        return self.folder / STAGED / self.shards[number].name

    def _prepare(self, number: int) -> None:
        """Fetch the index of a shard, and give its tar its size."""
        shard = self.shards[number]
        index, tar = self.folder / shard.index, self.folder / shard.name
        with self._downloads.held(number), explain_write_errors(self.folder):
            if not (index.exists() and _digest(index.read_bytes()) == shard.index_sha256):
                write_atomically(index, self._verified_index(shard))
            if not (tar.exists() and tar.stat().st_size == shard.bytes):
                self._mark(number).unlink(missing_ok=True)
                with open(tar, "ab") as file:
                    file.truncate(shard.bytes)

    def _verified_index(self, shard: Shard) -> bytes:
        url = join(self.url, shard.index)
        for _ in range(2):
            content = read_file(url)
            if _digest(content) == shard.index_sha256:
                return content
        raise _wrong(url)

    def _fetch(self, number: int, stop: Event) -> int:
        shard = self.shards[number]
        for _ in range(2):
            if self._download(shard, stop) == shard.sha256:
                self._mark(number).touch()
                return shard.bytes
        raise _wrong(join(self.url, shard.name))

    def _download(self, shard: Shard, stop: Event) -> str:
        """Write the content of a tar where its placeholder is; return its SHA-256."""
        url, digest = join(self.url, shard.name), hashlib.sha256()
        with open(self.folder / shard.name, "r+b") as tar:
            for start in range(0, shard.bytes, BLOCK):
                if stop.is_set():
                    raise StagingStopped
                block = read_range(url, start, min(start + BLOCK, shard.bytes))
                digest.update(block)
                tar.write(block)
            tar.flush()
            os.fsync(tar.fileno())
        return digest.hexdigest()

    def _evict(self, number: int) -> bool:
        """Take the content of a shard from the disk; leave one that a loader uses, and return False."""
        if not self._uses.try_to_hold(number):
            return False
        try:
            self._mark(number).unlink(missing_ok=True)
            for size in (0, self.shards[number].bytes):
                os.truncate(self.folder / self.shards[number].name, size)
        finally:
            self._uses.release(number)
        return True


OTHER_FILES = 1024
"""Number of files that a process may have open beside the tars of a split."""


def _allow_open_files(manifest: Manifest) -> None:
    """Raise the process's limit of open files: DALI keeps all tars open that may be evicted.

    Raise ShardError where the system does not allow as many.
    """
    needed = len(manifest.shards) + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ShardError(
            f"data.cache_gb: {len(manifest.shards):,} shards of '{manifest.split}' are open at once, and the system "
            f"allows {hard:,} files (ulimit -Hn): raise that, make larger shards (--shard-mb), or omit data.cache_gb"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _wrong(url: str) -> ShardError:
    return ShardError(
        f"{url} is not the file of the manifest (its SHA-256 differs, twice): "
        "upload the shards again, manifest.json last"
    )

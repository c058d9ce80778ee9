"""Options of sources and shard folders at URLs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shards.errors import ShardError
from shards.sources.remote_tars import is_remote
from shards.urls import is_url, is_web

MIRROR = ".remote"
"""Folder in a work folder for the state of its OUT at a URL."""


@dataclass(frozen=True)
class RemoteOptions:
    """Local folders for a source or an OUT that is not on this machine's disks."""

    staging: Path | None = None
    """Folder on a disk with room for all tars of a SRC at URLs, which are copied there for the run.
    Default: OUT, or the work folder of an OUT at a URL."""
    work_dir: Path | None = None
    """Folder on a disk with room for all shards of an OUT at a URL; a rerun of the command resumes from it.
    Default: iwm-work-NAME-HASH in the current folder, with the URL's last part and a hash of the URL."""
    keep_local: bool = False
    """Keep the shards in the work folder after their upload to an OUT at a URL."""


def check_remote_options(options: RemoteOptions, source: str, kind: str, out: str | Path) -> None:
    """Raise ShardError for an option that this source or OUT does not use, and for an OUT that takes no files."""
    if is_remote(source) and kind not in ("auto", "webdataset"):
        raise ShardError(f"--source {kind} is for files on a disk: copy {source} there")
    if options.staging is not None and not is_remote(source):
        raise ShardError(f"--staging is for a SRC at URLs; {source} is read where it is: omit the option")
    if not is_url(str(out)) and (options.work_dir is not None or options.keep_local):
        option = "--keep-local" if options.work_dir is None else "--work-dir"
        raise ShardError(f"{option} is for an OUT at a URL; {out} is a folder: omit the option")
    if is_web(str(out)):
        raise ShardError(f"OUT {out} is on a web server, which takes no files: use s3://, gs://, or a folder")
    if str(out).startswith("hf://"):
        raise ShardError(f"OUT {out}: the Hub makes a commit of each file: use a folder, then hf upload-large-folder")
    work = options.work_dir
    if work and not options.keep_local and work.exists() and any(work.iterdir()) and not (work / MIRROR).exists():
        raise ShardError(f"--work-dir {work} has other files, and shards are deleted there: use an empty folder")

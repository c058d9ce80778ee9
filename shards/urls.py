"""Files at URLs, through fsspec: object stores, the Hugging Face Hub, web servers.

A request that fails for a reason that may pass (a lost connection, a stalled or overloaded server, an answer cut off)
is repeated with growing pauses. All errors are ShardErrors of one line.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from shards.errors import ShardError, one_line

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hub", "http": "http", "https": "http"}
"""Extra of this project with the package that fsspec needs, by protocol."""

TIME_LIMIT = 60.0
"""Time (seconds) after which a request counts as stalled. One that reads asks for at most BLOCK bytes."""
BLOCK = 8 * 2**20
"""Size of the range of a file that one request reads (bytes)."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)
"""Pauses between the attempts at a request (seconds)."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")


def is_url(location: str) -> bool:
    """Return True for a URL, which has a protocol: s3://bucket/folder. Everything else is a path."""
    return _URL.match(location) is not None


def join(url: str, name: str) -> str:
    """Return the URL of the file `name` in the folder at `url`."""
    return f"{url.rstrip('/')}/{name}"


class RemoteFile(NamedTuple):
    """File in a folder at a URL."""

    url: str
    size: int
    """Size (bytes)."""


def read_range(url: str, start: int, end: int) -> bytes:
    """Return the bytes [start, end) of a file, by one request. Raise ShardError where it cannot be read.

    A web server may ignore the range and send the whole file; the other bytes are dropped.
    """

    def read() -> bytes:
        data: bytes = _call(url, "cat_file", start=start, end=end)
        if len(data) > end - start:
            data = data[start:end]
        if len(data) != end - start:
            raise ConnectionError(f"{len(data):,} bytes came in place of {end - start:,}")
        return data

    return _retry(url, read, "read") if end > start else b""


def read_file(url: str) -> bytes:
    """Return the content of a small file. Raise ShardError where it cannot be read."""
    return _retry(url, lambda: _call(url, "cat_file"), "read")


def exists(url: str) -> bool:
    """Return True where there is a file or a folder at the URL. Raise ShardError where that cannot be found out."""
    return bool(_retry(url, lambda: _call(url, "exists"), "read"))


def file_size(url: str) -> int:
    """Return the size of a file (bytes). Raise ShardError where the file does not exist or has no size."""
    info = _retry(url, lambda: _call(url, "info"), "read")
    if info.get("size") is None:
        raise ShardError(f"{url}: its server does not tell the file's size; copy it to a folder or an object store")
    return int(info["size"])


def list_files(url: str) -> list[RemoteFile]:
    """Return the files in the folder at `url`, in order of their names, without those of its subfolders.

    Raise ShardError where the folder cannot be listed. Web servers mostly cannot.
    """
    entries = _retry(url, lambda: _call(url, "ls", detail=True), "list")
    files = [entry for entry in entries if entry["type"] == "file"]
    names = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in files}
    return [RemoteFile(join(url, name), int(names[name]["size"] or 0)) for name in sorted(names) if name]


def upload(path: Path, url: str) -> None:
    """Write a file to a URL. Raise ShardError where that fails, or where the file there has another size afterwards."""

    def put() -> None:
        _call(url, "put_file", before=str(path), limited=False)
        size = _call(url, "info").get("size")
        if size != path.stat().st_size:
            raise ConnectionError(f"{size} bytes arrived in place of {path.stat().st_size}")

    _retry(url, put, "write")


def delete(url: str) -> None:
    """Delete a file. Raise ShardError where that fails; a file that does not exist counts as deleted."""

    def remove() -> None:
        try:
            _call(url, "rm_file")
        except FileNotFoundError:
            return

    _retry(url, remove, "delete")


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL and the path in it. Raise ShardError for an unknown protocol.

    fsspec takes credentials and endpoints from where their tools do (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, HF_TOKEN, …),
    and all of its options from FSSPEC_CONFIG_DIR.
    """
    protocol = url.partition("://")[0]
    try:
        fsspec = importlib.import_module("fsspec.core")
        system, path = fsspec.url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install 'iwm[{extra}]'" if extra else "install that package"
        raise ShardError(f"{url}: {one_line(error)}; {remedy}") from error
    except ValueError as error:
        raise ShardError(f"{url}: {one_line(error)}; use s3://, gs://, hf://, https://, or a folder") from error
    return system, path


def _call(url: str, method: str, *, before: str | None = None, limited: bool = True, **options: Any) -> Any:
    """Call a method of fsspec on the URL's path, with TIME_LIMIT if `limited` and where the file system has one.

    before: argument before the path.
    """
    system, path = file_system(url)
    system.invalidate_cache()
    arguments = [path] if before is None else [before, path]
    if not (system.async_impl and limited):
        return getattr(system, method)(*arguments, **options)
    sync = importlib.import_module("fsspec.asyn").sync
    return sync(system.loop, getattr(system, f"_{method}"), *arguments, timeout=TIME_LIMIT, **options)


ResultT = TypeVar("ResultT")
"""Type of what a request returns."""


def _retry(url: str, request: Callable[[], ResultT], verb: str) -> ResultT:
    """Make a request until it succeeds. Raise ShardError after the last attempt, or for an error that stays."""
    for pause in (*PAUSES, None):
        try:
            return request()
        except ShardError:
            raise
        # Every file system raises errors of its own libraries, which have no common class.
        except Exception as error:
            if pause is None or _is_permanent(error):
                raise ShardError(f"cannot {verb} {url}: {_describe(error)}; {_remedy(error)}") from error
            time.sleep(pause)
    raise AssertionError("unreachable: the last attempt returns or raises")


_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, TypeError)
"""Errors that another attempt does not change."""


def _is_permanent(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, _LASTING) or "credentials" in str(error).lower()


def _describe(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    return one_line(error) or type(error).__name__


def _remedy(error: Exception) -> str:
    if isinstance(error, PermissionError) or "credentials" in str(error).lower():
        return "set the store's credentials as its own tools do (for s3 AWS_ACCESS_KEY_ID, AWS_PROFILE, …)"
    if _is_permanent(error):
        return "correct the URL"
    return "the server did not answer; rerun the same command"

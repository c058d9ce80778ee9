"""Files at URLs, through fsspec: object stores, the Hugging Face Hub, web servers.

A request that fails for a reason that may pass (a lost connection, a stalled or overloaded server, an answer cut off)
is repeated with growing pauses. All errors are ShardErrors of one line.
"""

from __future__ import annotations

import errno
import importlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from shards.errors import ShardError, one_line

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hub", "http": "http", "https": "http"}
"""Extra of this project with the package that fsspec needs, by protocol."""

TIME_LIMIT = 60.0
"""Time (seconds) after which a request counts as stalled. One that reads asks for at most BLOCK bytes."""
BLOCK = 8 * 2**20
"""Size of the range of a file that one request reads (bytes)."""
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)
"""Pauses between the attempts at a request (seconds)."""
REQUESTS_AT_ONCE = 16
"""Number of requests about files that are made at the same time."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that has no room."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")


def is_url(location: str) -> bool:
    """Return True for a URL, which has a protocol: s3://bucket/folder. Everything else is a path."""
    return _URL.match(location) is not None


def is_web(url: str) -> bool:
    """Return True for the URL of a web server, most of which cannot list a folder and take no files."""
    return url.startswith(("http://", "https://"))


def join(url: str, name: str) -> str:
    """Return the URL of the file `name` in the folder at `url`."""
    return f"{url.rstrip('/')}/{name}"


def folder_name(url: str) -> str:
    """Return a name for a local folder that belongs to a URL: its last part, without signs."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", url.rstrip("/").rpartition("/")[2])


class RemoteFile(NamedTuple):
    """File in a folder at a URL."""

    url: str
    size: int
    """Size (bytes)."""
    checksum: str = ""
    """Tag of the content, which changes with it: the store's ETag, hash or time; empty where it tells none."""


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
    size, _ = describe_file(url)
    if size is None:
        raise ShardError(f"{url}: its server does not tell the file's size; copy it to a folder or an object store")
    return size


def describe_file(url: str) -> tuple[int | None, str]:
    """Return size (bytes; None where the server does not tell it) and checksum of a file, as RemoteFile has them."""
    info = _retry(url, lambda: _call(url, "info"), "read")
    return info.get("size"), _checksum(info)


def list_files(url: str) -> list[RemoteFile]:
    """Return the files in the folder at `url`, in order of their names, without those of its subfolders.

    Raise ShardError where the folder cannot be listed. Web servers mostly cannot.
    """
    entries = _retry(url, lambda: _call(url, "ls", detail=True), "list")
    files = [entry for entry in entries if entry["type"] == "file"]
    names = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in files}
    return [
        RemoteFile(join(url, name), int(names[name]["size"] or 0), _checksum(names[name]))
        for name in sorted(names)
        if name
    ]


_CHECKSUMS = ("ETag", "md5Hash", "etag", "Content-MD5", "blob_id", "Last-Modified", "mtime")
"""Names of checksums in the answers of file systems, and of times of change for stores that have none."""


def _checksum(info: dict[str, Any]) -> str:
    return next((str(info[name]).strip('"') for name in _CHECKSUMS if info.get(name)), "")


def download(url: str, path: Path, report: Callable[[int], None] = lambda added: None) -> None:
    """Copy a file from a URL to a path. Raise ShardError where it cannot be read.

    A web server sends the file as one stream; where it is cut off, the rest is asked for, or all of it from a server
    without ranges. Object stores are read by ranges. report: called with the number of bytes that were added to the
    file, which is negative where they had to be dropped; a ShardError that it raises ends the copy.
    """
    system, _ = file_system(url)
    with open(path, "wb") as file:
        if is_web(url):
            _retry(url, lambda: _stream_rest(url, file, report), "read")
        elif system.async_impl:
            size = file_size(url)
            for start in range(0, size, BLOCK):
                file.write(read_range(url, start, min(start + BLOCK, size)))
                report(min(BLOCK, size - start))
        else:
            _retry(url, lambda: _call(url, "get_file", after=str(path)), "read")
            report(path.stat().st_size)


def _stream_rest(url: str, file: BinaryIO, report: Callable[[int], None]) -> None:
    """Write what follows the file's present content, by one request to a web server."""
    system, address = file_system(url)
    importlib.import_module("fsspec.asyn").sync(system.loop, _stream, system, address, file, report)


async def _stream(system: Any, address: str, file: BinaryIO, report: Callable[[int], None]) -> None:
    start = file.tell()
    options = dict(system.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    # Streams may take long, pauses in them may not.
    timeout = importlib.import_module("aiohttp").ClientTimeout(
        total=None, sock_connect=TIME_LIMIT, sock_read=TIME_LIMIT
    )
    session = await system.set_session()
    async with session.get(system.encode_url(address), headers=headers, timeout=timeout, **options) as answer:
        if start and answer.status != 206:
            file.seek(0)
            file.truncate()
            report(-start)
        if answer.status == 416:
            raise ConnectionError("the server does not send the rest of the file")
        answer.raise_for_status()
        async for chunk in answer.content.iter_chunked(2**20):
            file.write(chunk)
            report(len(chunk))


def upload(path: Path, url: str) -> None:
    """Write a file to a URL. Raise ShardError where that fails, or where the file there has another size afterwards."""

    def put() -> None:
        if not file_system(url)[0].async_impl:  # not an object store: its folders must exist
            _call(url.rpartition("/")[0], "makedirs", exist_ok=True)
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


def _call(
    url: str, method: str, *, before: str | None = None, after: str | None = None, limited: bool = True, **options: Any
) -> Any:
    """Call a method of fsspec on the URL's path, with TIME_LIMIT if `limited` and where the file system has one.

    before, after: arguments before and after the path.
    """
    system, path = file_system(url)
    system.invalidate_cache()
    arguments = [argument for argument in (before, path, after) if argument is not None]
    if not (system.async_impl and limited):
        return getattr(system, method)(*arguments, **options)
    sync = importlib.import_module("fsspec.asyn").sync
    return sync(system.loop, getattr(system, f"_{method}"), *arguments, timeout=TIME_LIMIT, **options)


ResultT = TypeVar("ResultT")
"""Type of what a request returns."""


def _retry(url: str, request: Callable[[], ResultT], verb: str) -> ResultT:
    """Make a request until it succeeds. Raise ShardError after the last attempt, or for an error that stays.

    An OSError about a full disk of this machine is raised as it is.
    """
    for pause in (*PAUSES, None):
        try:
            return request()
        except ShardError:
            raise
        # Every file system raises errors of its own libraries, which have no common class.
        except Exception as raised:
            if isinstance(raised, OSError) and raised.errno in DISK_FULL:
                raise
            error = _cause(raised)
            if pause is None or _is_permanent(error):
                raise ShardError(f"cannot {verb} {url}: {_describe(error, verb)}; {_remedy(error)}") from raised
            time.sleep(pause)
    raise AssertionError("unreachable: the last attempt returns or raises")


_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, TypeError)
"""Errors that another attempt does not change; the last two are of file systems that lack a method or an argument."""


def _cause(error: Exception) -> Exception:
    """Return the answer of a server for which a file system says that the file does not exist, unless it says so."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception) or _status(cause) == 404:
        return error
    return cause if _status(cause) or type(cause).__module__.startswith("aiohttp") else error


def _is_permanent(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, _LASTING) or _lacks_credentials(error)


def _status(error: Exception) -> int | None:
    """Return the HTTP status in an error of aiohttp or the Hub."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _lacks_credentials(error: Exception) -> bool:
    return isinstance(error, PermissionError) or _status(error) in (401, 403) or "credentials" in str(error).lower()


def _describe(error: Exception, verb: str) -> str:
    if isinstance(error, FileNotFoundError):
        return "its bucket or folder does not exist" if verb == "write" else "it does not exist"
    return one_line(error) or type(error).__name__


def _remedy(error: Exception) -> str:
    if _lacks_credentials(error):
        return "set the store's credentials as its own tools do (s3: AWS_ACCESS_KEY_ID, AWS_PROFILE; hf: HF_TOKEN, …)"
    if _is_permanent(error):
        return "correct the URL"
    return "the server did not answer; rerun the same command"

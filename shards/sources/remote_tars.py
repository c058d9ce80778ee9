"""Sources that are not on this machine's disks: WebDataset tars at URLs, and commands that print tars (`pipe:`)."""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections import Counter
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

from shards.errors import ShardError, one_line
from shards.format import MANIFEST
from shards.urls import REQUESTS_AT_ONCE, RemoteFile, describe_file, exists, is_url, is_web, join, list_files

PIPE = "pipe:"
"""Beginning of a source that is a command whose output is a tar."""

_TAR_IN_COMMAND = re.compile(r"[\w%+~.-]*\w\.tar(?!\w)")
_ARCHIVE = re.compile(r"\.(tgz|zip|tar\.\w+)$", re.IGNORECASE)


class RemoteTar(NamedTuple):
    """A tar of a source: a file at a URL, or the output of a command."""

    location: str
    """URL, or `pipe:` and the command."""
    name: str
    """Path in the staging folder. Its last part is the tar's name in rejected.jsonl, as for a tar on a disk."""
    size: int | None = None
    """Size (bytes); None where the server does not tell it, and for commands."""
    checksum: str = ""
    """Tag of the content, see RemoteFile; empty where there is none."""


def is_remote(source: str) -> bool:
    """Return True for URLs and commands, False for paths."""
    return is_url(source) or source.startswith(PIPE)


def find_tars(source: str) -> list[RemoteTar]:
    """Return the tars of a source in the order in which they are listed, with the sizes that their servers tell.

    A source is the URL of a tar, of a folder of tars, or a glob in the last part of a URL, or a command. webdataset
    expands brace patterns; `::` joins several sources, `${NAME}` stands for the variable WDS_NAME. Raise ShardError
    where a tar does not exist.
    """
    listings: dict[str, list[RemoteFile]] = {}
    tars: list[RemoteTar] = []
    for location in _expand(source):
        if location.startswith(PIPE) or (is_web(location) and _file_name(location).endswith(".tar")):
            tars.append(RemoteTar(location, _file_name(location)))
        else:
            tars += _listed(location, listings)
    location, times = Counter(tar.location for tar in tars).most_common(1)[0]
    if times > 1:
        raise ShardError(f"{location} is named {times} times; correct the source")
    with ThreadPool(REQUESTS_AT_ONCE) as pool:
        tars = pool.map(_describe, tars, chunksize=1)
    return _name_apart(tars)


def manifest_beside(tars: list[RemoteTar]) -> str | None:
    """Return the URL of the manifest beside the tars, which a shard folder of this project has; None without."""
    folders = {tar.location.rpartition("/")[0] for tar in tars}
    if len(folders) > 1 or tars[0].location.startswith(PIPE) or "?" in tars[0].location:
        return None
    url = join(folders.pop(), MANIFEST)
    return url if exists(url) else None


def _expand(source: str) -> list[str]:
    shardlists = importlib.import_module("webdataset.shardlists")
    try:
        locations: list[str] = shardlists.expand_urls(source)
    except (AssertionError, ValueError) as error:
        raise ShardError(f"{source}: {one_line(error)}; correct the pattern, or set the variable") from error
    for location in locations:
        if not is_remote(location):
            raise ShardError(f"{location} is not a URL, unlike the rest of the source; copy the tars to one place")
    return locations


def _file_name(location: str) -> str:
    if location.startswith(PIPE):
        named = _TAR_IN_COMMAND.findall(location)
        return named[-1] if named else "pipe.tar"
    path = location.partition("?")[0] if is_web(location) else location
    return path.rpartition("/")[2]


def _listed(location: str, listings: dict[str, list[RemoteFile]]) -> list[RemoteTar]:
    """Return the tars of a folder, those that fit a glob, or the one tar, from the listing of its folder."""
    name = _file_name(location)
    if _ARCHIVE.search(name):
        raise ShardError(f"{location} is compressed; decompress it first, or with pipe: (pipe:COMMAND | gunzip)")
    if any(sign in name for sign in "*?["):
        folder, pattern, fault = location.rpartition("/")[0], name, "matches no file"
    elif name.endswith(".tar"):
        folder, pattern, fault = location.rpartition("/")[0], name, "does not exist"
    else:
        folder, pattern, fault = location, "*.tar", "has no tars"
    if folder not in listings:
        listings[folder] = list_files(folder)
    files = [file for file in listings[folder] if fnmatch.fnmatchcase(_file_name(file.url), pattern)]
    if not files:
        raise ShardError(f"{location} {fault}; correct the source: tars, a folder of them, or a glob")
    return [RemoteTar(file.url, _file_name(file.url), file.size or None, file.checksum) for file in files]


def _describe(tar: RemoteTar) -> RemoteTar:
    """Ask a web server for size and checksum; object stores have told them in the listing of the folder."""
    if not is_web(tar.location):
        return tar
    size, checksum = describe_file(tar.location)
    return tar._replace(size=size, checksum=checksum)


def _name_apart(tars: list[RemoteTar]) -> list[RemoteTar]:
    """Give the tars different paths; their names stay where they are those of different folders."""
    if len({tar.name for tar in tars}) == len(tars):
        return tars
    if all(tar.location.startswith(PIPE) for tar in tars):
        return [tar._replace(name=f"pipe-{number:06d}.tar") for number, tar in enumerate(tars)]
    return [tar._replace(name=f"{number:06d}/{tar.name}") for number, tar in enumerate(tars)]

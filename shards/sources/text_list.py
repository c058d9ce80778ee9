"""Source: a text file of image paths, one per line, read several times and not held in memory."""

from __future__ import annotations

import codecs
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.errors import ShardError
from shards.listing import Labels, SampleList
from shards.sources.file_lists import PathResolver, decode_text, labelled, read_path, unlabelled

_WITH_CLASS = re.compile(r"(\S.*?)\s+(\d+)")


def is_list(file: Path) -> bool:
    """Return True where the first line of a .csv file is a path, a space and a class index, without a comma."""
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        first = lines.readline().strip()
    return "," not in first and _WITH_CLASS.fullmatch(first) is not None


def list_lines(file: Path, find: PathResolver, labels: Labels) -> SampleList:
    """List a text file with one image per line: `PATH NUMBER` on all lines (Places205), or `PATH` (SUN397, own images).

    With `auto` the class is the number, else the path's folder if all paths are relative and lie in at least two
    folders. With `folders` it is the path's folder. A number is never a part of the path. A line whose image does not
    exist is rejected. Raise ShardError for a list that is empty or mixes the two forms, and with `folders` for a path
    without a folder.
    """
    with _open_text(file) as text:
        first: dict[bool, int] = {}
        for line in _parsed(file, text):
            first.setdefault(bool(line.number), line.place)
        if not first:
            raise ShardError(f"{file} is empty: it must have one image path per line")
        if len(first) == 2:
            raise ShardError(f"{file}, line {first[False]}: no class number after the path, unlike other lines; add it")
        if labels == "none":
            return unlabelled((line.name for line in _parsed(file, text)), find, "no labels")
        if labels == "auto" and True in first:
            origin, class_of = "the number on each line", _number
            classes = {_number(line) for line in _parsed(file, text)}
        else:
            origin, class_of = "the folder of each path", _folder
            folders = _read_folders(_parsed(file, text))
            reason = _not_labels(folders) if labels == "auto" else None
            if reason:
                return unlabelled((line.name for line in _parsed(file, text)), find, f"no labels: {reason}")
            if folders.bare:
                place, name = folders.bare
                raise ShardError(
                    f"{file}, line {place}: '{name}' has no class: put the image into a folder named after its "
                    "class, or omit --labels folders"
                )
            classes = folders.names
        listing = labelled(((line.name, class_of(line)) for line in _parsed(file, text)), find, classes)
    listing.labelling = f"labels: {origin}, {len(listing.columns[0].classes):,} classes; --labels none ignores them"
    return listing


class _Line(NamedTuple):
    """Line of a list that is not empty. `number` is the class index after the path, or empty."""

    place: int
    text: str
    name: str
    number: str


def _number(line: _Line) -> str:
    return str(int(line.number))


def _folder(line: _Line) -> str:
    return os.path.dirname(read_path(line.name))


@contextmanager
def _open_text(file: Path) -> Iterator[BinaryIO]:
    """Open a list that is read several times, so that it need not fit in memory; a pipe is copied first."""
    with open(file, "rb") as source:
        if source.seekable():
            yield source
        else:
            with tempfile.TemporaryFile() as stored:
                shutil.copyfileobj(source, stored)
                yield stored


def _parsed(file: Path, stored: BinaryIO) -> Iterator[_Line]:
    """Yield the lines of a list. Raise ShardError where it is not UTF-8 text."""
    stored.seek(0)
    lines = chain.from_iterable(map(str.splitlines, codecs.iterdecode(stored, "utf-8-sig")))
    try:
        for place, line in enumerate(map(str.strip, lines), start=1):
            if line:
                match = _WITH_CLASS.fullmatch(line)
                yield _Line(place, line, match[1], match[2]) if match else _Line(place, line, line, "")
    except UnicodeDecodeError:
        stored.seek(0)
        decode_text(file, stored.read())  # raises, with the place in the whole file


class _Folders(NamedTuple):
    """Folders of the paths of a list; the first line without one, with its text; the first line with a leading slash.

    A path without a folder counts as one in the folder ''.
    """

    names: set[str]
    bare: tuple[int, str] | None
    bare_path: str
    absolute: int | None


def _read_folders(lines: Iterable[_Line]) -> _Folders:
    names: set[str] = set()
    bare: tuple[int, str] | None = None
    bare_path, absolute = "", None
    for line in lines:
        path = read_path(line.name)
        names.add(os.path.dirname(path))
        if bare is None and not os.path.dirname(path):
            bare, bare_path = (line.place, line.text), path
        if absolute is None and path.startswith("/"):
            absolute = line.place
    return _Folders(names, bare, bare_path, absolute)


def _not_labels(folders: _Folders) -> str | None:
    """Return why the folders of paths are not classes, with the way to labels; None where they are."""
    if folders.bare:
        return (
            f"line {folders.bare[0]} has no folder ({folders.bare_path!r}); a class number after each path gives labels"
        )
    if folders.absolute:
        return f"line {folders.absolute} is an absolute path; --labels folders makes each path's folder its class"
    if len(folders.names) == 1:
        return f"all images are in the folder {min(folders.names)!r}; --labels folders makes it the class"
    return None

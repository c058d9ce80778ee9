"""What a user of the benchmarks can get wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class BenchmarkError(ValueError):
    """A benchmark that cannot be run; the message names the option and the remedy."""


def named(option: str, name: str, table: Mapping[str, T]) -> T:
    """The table's entry of that name. Raises BenchmarkError, saying which names there are."""
    if name not in table:
        raise BenchmarkError(f"{option} {name}: there is none of that name; there are {', '.join(table)}")
    return table[name]


def make_room_for(option: str, file: Path) -> None:
    """Make the file's folder. Raises BenchmarkError where the file could not be written there."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"{option} {file}: its folder cannot be made: {error.strerror}") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise BenchmarkError(f"{option} {file}: no file can be written there; choose another place")

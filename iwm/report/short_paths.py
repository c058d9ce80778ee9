"""Absolute paths in texts of a run, shortened to their last two parts, so that a page names no folder of a machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

PATH_FIELDS = ("checkpoint", "shards", "output", "run", "folder")
"""Fields of results whose text is a path as a whole."""
_IN_TEXT = re.compile(r"(?<![\w.~…/:])/(?:[^\s/'\",:;()\[\]<>]+/)+[^\s/'\",:;()\[\]<>]*")
"""Absolute path of two or more parts without white space."""
_YAML_VALUE = re.compile(r"^(\s*(?:- |[\w.]+: ))(['\"]?)(/.+?)\2$", re.MULTILINE)


def short_path(path: str) -> str:
    """Return the last two parts of an absolute path after an ellipsis, and any other text as it is."""
    parts = PurePosixPath(path).parts
    return path if not path.startswith("/") or len(parts) < 2 else f"…/{'/'.join(parts[1:][-2:])}"


def short_paths_of_yaml(text: str) -> str:
    """Return YAML whose values have no absolute path."""
    return short_paths(_YAML_VALUE.sub(lambda match: f"{match[1]}{match[2]}{short_path(match[3])}{match[2]}", text))


def short_paths(value: Any) -> Any:
    """Return JSON content whose texts have no absolute path.

    The path of a field in PATH_FIELDS may contain spaces, and is recognised in all other texts too.
    """
    known = sorted(set(_paths(value)), key=len, reverse=True)
    return _shortened(value, known)


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (value[name] for name in PATH_FIELDS if str(value.get(name)).startswith("/"))
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _paths(item)


def _shortened(value: Any, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {_shortened(key, known): _shortened(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_shortened(item, known) for item in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    for path in known:
        value = value.replace(path, short_path(path))
    return _IN_TEXT.sub(lambda match: short_path(match[0]), value)

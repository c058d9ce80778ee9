"""Atomic file writes, safe against a kill or a power cut."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def unique_name() -> str:
    """Return a name that no other process has, on any machine that sees the same folder."""
    return secrets.token_hex(8)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file next to `path`, fsync and rename it: readers see the old file or the complete new one."""
    temporary = path.with_name(f".{path.name}.{unique_name()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Fsync the folder, so that renames in it are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

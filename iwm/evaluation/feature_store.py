"""Pooled features of many images in files: written batch by batch, read in chunks, resumed after an interruption.

A folder holds one split: NAME.f32 for each kind of features, with a row of float32 per image in the order of the split;
labels.i64; done.json, which tells of whom the features are and how many images are complete. Memory is that of a batch
in writing and of a chunk in reading, whatever the number of images.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from iwm.config import ConfigError
from shards.atomic import write_atomically

CHUNK_ROWS = 16_384
"""Images in a chunk: at ViT-B's width 50 MB in the file, 100 MB in float64."""

DONE, LABELS = "done.json", "labels.i64"
FLOAT = np.dtype("<f4")
INTEGER = np.dtype("<i8")


@dataclass(frozen=True)
class WrittenPart:
    """Part of a store that is complete on the disk."""

    images: int = 0
    width: int = 0
    random_state: str = ""
    """State of the random generator after these images, as hexadecimal digits; empty without one."""


class FeatureStore:
    """Features of the first images of a split in a folder."""

    def __init__(self, folder: Path, names: Sequence[str], images: int, identity: dict[str, Any]) -> None:
        """Open or create the folder; what it holds of another identity is deleted.

        names: kinds of features. images: their number in the end. identity: all that the features depend on, as can be
        written as JSON.
        """
        self.folder, self.names, self.images = folder, tuple(names), images
        self._identity = json.loads(json.dumps({**identity, "names": names, "images": images}))
        self.written = self._read_done()
        if not self.written.images and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for path, row in self._files():
            if path.exists():
                os.truncate(path, row * self.written.images)

    def bytes_needed(self, width: int) -> int:
        """Return the size of all files in the end. width: of a row of features."""
        return self.images * (len(self.names) * width * FLOAT.itemsize + INTEGER.itemsize)

    def require_space(self, width: int, option: str) -> None:
        """Raise ConfigError, which names `option`, where the disk has less room than what remains to be written."""
        needed = self.bytes_needed(width) * (self.images - self.written.images) / self.images
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ConfigError(
                f"{self.folder}: the features of {self.images:,} images need {needed / 1e9:.1f} GB more, and "
                f"{free / 1e9:.1f} GB are free; use another {option} or fewer images"
            )

    def append(self, features: Float[Tensor, "b s d"], labels: Int64[Tensor, " b"]) -> None:
        """Write the next images, s features each; they count as complete after the next `save`."""
        values = features.float().cpu().numpy().astype(FLOAT, copy=False)
        for number, name in enumerate(self.names):
            self._append(self._path(name), np.ascontiguousarray(values[:, number]))
        self._append(self.folder / LABELS, labels.cpu().numpy().astype(INTEGER, copy=False))

    def save(self, written: WrittenPart) -> None:
        """Record that images are complete, after all their bytes are on the disk."""
        self.written = written
        for path, _ in self._files():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        content = {"identity": self._identity, "written": written.__dict__}
        write_atomically(self.folder / DONE, (json.dumps(content) + "\n").encode())

    def labels(self) -> Int64[Tensor, " n"]:
        """Return the labels of all images."""
        return torch.from_numpy(np.fromfile(self.folder / LABELS, INTEGER).astype(np.int64))

    def chunks(self, name: str, device: torch.device, memory: int, rows: int = CHUNK_ROWS) -> StoredChunks:
        """Return one kind of features in chunks of `rows` images on a device. memory: bytes that may stay there."""
        return StoredChunks(self._path(name), self.written.images, self.written.width, device, memory, rows)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.f32"

    def _files(self) -> list[tuple[Path, int]]:
        """Return every file with the bytes of an image in it."""
        row = self.written.width * FLOAT.itemsize
        return [*((self._path(name), row) for name in self.names), (self.folder / LABELS, INTEGER.itemsize)]

    @staticmethod
    def _append(path: Path, values: np.ndarray) -> None:
        with path.open("ab") as file:
            file.write(values.tobytes())

    def _read_done(self) -> WrittenPart:
        """Return what is complete; nothing where the record is of another identity, damaged, or longer than a file."""
        try:
            content = json.loads((self.folder / DONE).read_bytes())
            self.written = WrittenPart(**content["written"])
            whole = all(path.stat().st_size >= row * self.written.images for path, row in self._files())
            return self.written if whole and content["identity"] == self._identity else WrittenPart()
        except (OSError, ValueError, KeyError, TypeError):
            return WrittenPart()


class StoredChunks:
    """Rows of a file on a device, in chunks of consecutive rows. The first ones stay there, others are read each time.

    The file is read, not mapped, so that its pages do not count as memory of the process.
    """

    def __init__(self, path: Path, images: int, width: int, device: torch.device, memory: int, rows: int) -> None:
        """Open lazily. memory: bytes of chunks that may stay on the device."""
        self._path, self._images, self._width, self._device, self._rows = path, images, width, device, rows
        self._keep = memory // (rows * width * FLOAT.itemsize)
        self._kept: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[Float[Tensor, "rows d"]]:
        """Iterate over the chunks, float32."""
        for first in range(0, self._images, self._rows):
            if first not in self._kept:
                chunk = self._load(first)
                if len(self._kept) == self._keep:
                    yield chunk
                    continue
                self._kept[first] = chunk
            yield self._kept[first]

    def _load(self, first: int) -> Float[Tensor, "rows d"]:
        count = min(self._rows, self._images - first) * self._width
        values = np.fromfile(self._path, FLOAT, count, offset=first * self._width * FLOAT.itemsize)
        return torch.from_numpy(values).view(-1, self._width).to(self._device)

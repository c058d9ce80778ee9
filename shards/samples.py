"""Samples of a source, and a compact table of many.

A billion samples do not fit in memory as Python objects, which take 400 bytes each. The table packs a sample into 48
bytes, and the bytes of its path in a text that all share.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.growing import GrowingBytes


class FileRef(NamedTuple):
    """Reference to bytes on the disk: a whole file, or a byte range of a tar."""

    container: str
    """Path of the tar; for a whole file, the folder that `name` is relative to."""
    name: str
    offset: int | None
    """Offset in the tar (bytes); None for a whole file."""
    size: int

    @property
    def path(self) -> str:
        """Path of the file to open."""
        return self.container if self.offset is not None else os.path.join(self.container, self.name)


class Sample(NamedTuple):
    """One sample of a source. `labels` holds one class name per label column of the list."""

    key: str
    image: FileRef
    labels: tuple[str, ...]
    mask: FileRef | None = None


_FILE = np.dtype([("text", "<u8"), ("offset", "<i8"), ("size", "<i8"), ("container", "<u4"), ("name_length", "<u4")])
"""Packed FileRef. `text` is where its name begins; `offset` -1 stands for None."""
_SAMPLE = np.dtype([("image", _FILE), ("labels", "<u4"), ("key", "<u4"), ("key_length", "<u4"), ("mask", "<u4")])
"""Packed Sample. `key` is counted from the beginning of the image's name; `mask` 0 stands for None."""

_BLOCK = 2**15
"""Number of samples that are packed or unpacked at once."""

Rows = NDArray[np.int64]
"""Indices of samples in a table."""

T = TypeVar("T")


class _Numbers(dict[T, int]):
    """Number of each distinct value, given when it is first asked for; `in_order` has the values by number."""

    def __init__(self) -> None:
        self.in_order: list[T] = []

    def __missing__(self, value: T) -> int:
        self[value] = number = len(self.in_order)
        self.in_order.append(value)
        return number


class SampleTable:
    """Table of samples that grows at its end; `take` makes tables of a part of its rows, which share its bytes."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._text, self._samples, self._masks = GrowingBytes(), GrowingBytes(), GrowingBytes()
        self._containers, self._labels = _Numbers[str](), _Numbers[tuple[str, ...]]()
        self._pending: list[Sample] = []
        self._rows: Rows | None = None
        self.extend(samples)

    def __len__(self) -> int:
        packed = self._samples.size // _SAMPLE.itemsize if self._rows is None else len(self._rows)
        return packed + len(self._pending)

    def append(self, sample: Sample) -> None:
        """Append a sample. Raise ValueError for a table that was made by `take`."""
        if self._rows is not None:
            raise ValueError("a part of a table cannot grow")
        self._pending.append(sample)
        if len(self._pending) == _BLOCK:
            self._pack()

    def extend(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self.append(sample)

    def __iter__(self) -> Iterator[Sample]:
        return chain.from_iterable(map(self.read, self._blocks()))

    def read_keys(self) -> Iterator[str]:
        """Yield the key of each sample."""
        return chain.from_iterable(self._keys(self._packed(rows)) for rows in self._blocks())

    def contents(self) -> Iterator[tuple[str, int, tuple[str, ...], int | None]]:
        """Yield key, size of the image, labels and size of the mask (bytes) of each sample."""
        for rows in self._blocks():
            packed = self._packed(rows)
            labels = map(self._labels.in_order.__getitem__, packed["labels"].tolist())
            masks = (mask and mask.size for mask in self._mask_files(packed["mask"]))
            yield from zip(self._keys(packed), packed["image"]["size"].tolist(), labels, masks, strict=True)

    def read(self, rows: Rows) -> list[Sample]:
        """Return the samples of these rows."""
        packed = self._packed(rows)
        labels = map(self._labels.in_order.__getitem__, packed["labels"].tolist())
        columns = (self._keys(packed), self._files(packed["image"]), labels, self._mask_files(packed["mask"]))
        return list(map(Sample, *columns))

    def take(self, rows: Rows) -> SampleTable:
        """Return the table of these rows, in their order."""
        self._pack()
        part = copy.copy(self)
        part._pending = []
        part._rows = rows if self._rows is None else self._rows[rows]
        return part

    def drop_labels(self) -> None:
        """Take the labels away from all samples."""
        self._pack()
        before, self._labels = self._labels, _Numbers()
        self._labels.in_order = [()] * len(before.in_order)

    def bytes_of_files(self, most: int | None) -> int:
        """Return the sum of all sizes of images, none counted as more than `most`, and of all masks (bytes)."""
        total = 0
        for rows in self._blocks():
            packed = self._packed(rows)
            sizes = packed["image"]["size"]
            masks = packed["mask"][packed["mask"] > 0]
            total += int((sizes if most is None else np.minimum(sizes, most)).sum())
            total += int(_records(self._masks, _FILE)[masks - 1]["size"].sum())
        return total

    def _pack(self) -> None:
        if not self._pending:
            return
        keys, images, labels, masks = zip(*self._pending, strict=True)
        self._pending = []
        packed = np.zeros(len(keys), _SAMPLE)
        names = _encode(images)
        # Mostly a key is a part of the name, but for its %2F and %2E. Only other keys are stored, after the name.
        decoded = [key.encode() for key in "\n".join(keys).replace("%2F", "/").replace("%2E", ".").split("\n")]
        starts = list(map(bytes.find, names, decoded))
        texts = [name if at >= 0 else name + key for name, key, at in zip(names, decoded, starts, strict=True)]
        packed["key"] = [at if at >= 0 else len(name) for name, at in zip(names, starts, strict=True)]
        packed["key_length"] = list(map(len, decoded))
        packed["image"] = self._pack_files(images, names, texts)
        packed["labels"] = list(map(self._labels.__getitem__, labels))
        with_mask = [place for place, mask in enumerate(masks) if mask is not None]
        if with_mask:
            before = self._masks.size // _FILE.itemsize
            files = [mask for mask in masks if mask is not None]
            names = _encode(files)
            self._masks.append(self._pack_files(files, names, names).tobytes())
            packed["mask"][with_mask] = np.arange(before + 1, before + 1 + len(files))
        self._samples.append(packed.tobytes())

    def _pack_files(self, files: Sequence[FileRef], names: list[bytes], texts: list[bytes]) -> NDArray[np.void]:
        packed = np.empty(len(files), _FILE)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        packed["text"] = self._text.append(b"".join(texts)) + np.cumsum(lengths) - lengths
        packed["name_length"] = list(map(len, names))
        containers, _, offsets, sizes = zip(*files, strict=True)
        packed["container"] = list(map(self._containers.__getitem__, containers))
        packed["offset"] = [-1 if offset is None else offset for offset in offsets]
        packed["size"] = sizes
        return packed

    def _blocks(self) -> Iterator[Rows]:
        for start in range(0, len(self), _BLOCK):
            yield np.arange(start, min(start + _BLOCK, len(self)))

    def _packed(self, rows: Rows) -> NDArray[np.void]:
        self._pack()
        return _records(self._samples, _SAMPLE)[rows if self._rows is None else self._rows[rows]]

    def _keys(self, packed: NDArray[np.void]) -> list[str]:
        text = self._text.content
        starts = packed["image"]["text"] + packed["key"]
        keys = [text[a:b].decode() for a, b in zip(*_bounds(starts, packed["key_length"]), strict=True)]
        return "\n".join(keys).replace("/", "%2F").replace(".", "%2E").split("\n") if keys else []

    def _files(self, packed: NDArray[np.void]) -> list[FileRef]:
        text = self._text.content
        bounds = zip(*_bounds(packed["text"], packed["name_length"]), strict=True)
        names = [text[a:b].decode("utf-8", "surrogatepass") for a, b in bounds]
        containers = map(self._containers.in_order.__getitem__, packed["container"].tolist())
        offsets = [None if offset < 0 else offset for offset in packed["offset"].tolist()]
        return list(map(FileRef, containers, names, offsets, packed["size"].tolist()))

    def _mask_files(self, numbers: NDArray[np.uint32]) -> list[FileRef | None]:
        found: list[FileRef | None] = [None] * len(numbers)
        (places,) = np.nonzero(numbers)
        files = self._files(_records(self._masks, _FILE)[numbers[places] - 1])
        for place, file in zip(places.tolist(), files, strict=True):
            found[place] = file
        return found


def _records(data: GrowingBytes, kind: np.dtype[Any]) -> NDArray[np.void]:
    return np.frombuffer(data.content, kind) if data.size else np.empty(0, kind)


def _encode(files: Sequence[FileRef]) -> list[bytes]:
    """Encode the names of files, also those with surrogates, which stand for bytes that are not UTF-8."""
    return [file.name.encode("utf-8", "surrogatepass") for file in files]


def _bounds(starts: NDArray[np.uint64], lengths: NDArray[np.uint32]) -> tuple[list[int], list[int]]:
    return starts.tolist(), (starts + lengths).tolist()

"""Shard plan: the assignment of samples to shards, and subsets of a source.

The plan depends on the source and the settings alone and is made before any image is read. Each shard is a function of
its index in the plan. Therefore the result is the same for any number of workers and after any number of kills.

A subset is the part of a source that a text file names, such as SimCLR's lists of 1% and 10% of ImageNet.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from shards.errors import ShardError
from shards.format import Column, RejectionRecord
from shards.listing import SampleList, fit_key
from shards.samples import Rows, Sample, SampleTable

NAME_LENGTH = 100
"""Size of the name field in a tar header (bytes)."""

TAR_BLOCK = 512
"""Block size of a tar (bytes)."""


MAX_SHARDS = 1_000_000
"""Largest number of shards: their names have six digits."""


@dataclass(frozen=True)
class ShardSize:
    """Division into shards, whose numbers of samples differ by at most one."""

    shard_mb: float = 64.0
    """Approximate size of a shard (megabytes, 10⁶ bytes)."""
    min_shards: int = 8
    """Minimum number of shards, if there are as many samples. Each training process needs at least one shard."""


@dataclass(frozen=True)
class ShardPlan:
    """Samples and their shuffled order; shard i holds the samples `order[bounds[i] : bounds[i + 1]]`."""

    columns: list[Column]
    masks: bool
    samples: SampleTable
    key_length: int
    """Largest length of a key in the shards (characters)."""
    order: Rows
    bounds: list[int]
    rejections: list[RejectionRecord]
    hidden: int
    estimated_bytes: int
    digest: str
    """SHA-256 of all label columns, keys, sizes and labels, in the source's order."""

    @property
    def read(self) -> int:
        """Number of samples and rejections."""
        return len(self.samples) + len(self.rejections)

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1

    def shard(self, index: int) -> list[Sample]:
        samples = self.samples.read(self.order[self.bounds[index] : self.bounds[index + 1]])
        return [sample._replace(key=fit_key(sample.key, self.key_length)) for sample in samples]

    def samples_of(self, index: int) -> int:
        """Return the number of samples of a shard."""
        return self.bounds[index + 1] - self.bounds[index]


def plan_shards(
    listing: SampleList, known: list[Column] | None, seed: int, resize: int | None, cut: ShardSize
) -> ShardPlan:
    """Shorten long keys, reject samples with a duplicate key, shuffle the others and divide them into shards.

    `known`: label columns of the folder's other splits, which are used for this split too. Raise ShardError where they
    do not contain every class of the source, and for a source without samples.
    """
    if not listing.samples:
        first = f" (first: {listing.rejections[0].path} {listing.rejections[0].reason})" if listing.rejections else ""
        raise ShardError(f"the source has no samples; {len(listing.rejections)} rejected{first}")
    columns = listing.columns if known is None else _agree(listing.columns, known)
    components = [column.component for column in columns] + ["jpg"] + ["mask.png"] * listing.masks
    key_length = NAME_LENGTH - 1 - max(map(len, components))
    unique, duplicates = _reject_duplicates(listing.samples, key_length)
    digest = _digest(unique, key_length, columns)
    order = np.random.default_rng(seed).permutation(len(unique))
    total = _estimated_bytes(unique, resize, len(components))
    shards = min(max(round(total / (cut.shard_mb * 1e6)), cut.min_shards, 1), len(unique))
    if shards > MAX_SHARDS:
        raise ShardError(
            f"{shards:,} shards of {cut.shard_mb:g} MB are too many, at most {MAX_SHARDS:,}: "
            f"use --shard-mb {total // (MAX_SHARDS * 10**6) + 1} or more, and no more --min-shards"
        )
    bounds = np.linspace(0, len(unique), shards + 1).astype(int).tolist()
    return ShardPlan(
        columns,
        listing.masks,
        unique,
        key_length,
        order,
        bounds,
        listing.rejections + duplicates,
        listing.hidden,
        total,
        digest,
    )


def _reject_duplicates(samples: SampleTable, key_length: int) -> tuple[SampleTable, list[RejectionRecord]]:
    """Divide samples into the first with each key, and rejections. Keys are compared where their hashes are equal."""
    hashes = np.fromiter((hash(fit_key(key, key_length)) for key in samples.read_keys()), np.int64, len(samples))
    suspects = _repeated(hashes)
    first: dict[str, str] = {}
    duplicates = []
    keep = np.ones(len(samples), bool)
    for row, sample in zip(suspects.tolist(), samples.take(suspects), strict=True):
        key = fit_key(sample.key, key_length)
        if key in first:
            duplicates.append(RejectionRecord(sample.image.name, f"has the key '{key}' of {first[key]}"))
            keep[row] = False
        else:
            first[key] = sample.image.name
    return (samples.take(np.flatnonzero(keep)) if duplicates else samples), duplicates


def _repeated(hashes: NDArray[np.int64]) -> Rows:
    """Return the places of all hashes that occur more than once."""
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(repeated):
        return np.empty(0, np.int64)
    nearest = np.searchsorted(repeated, hashes).clip(max=len(repeated) - 1)
    return np.flatnonzero(repeated[nearest] == hashes)


def _agree(columns: list[Column], known: list[Column]) -> list[Column]:
    """Return the known columns in the source's order, so that all splits of a folder use the same class indices."""
    by_name = {column.name: column for column in known}
    if set(by_name) != {column.name for column in columns}:
        remedy = "make all splits from sources with the same labels"
        if not known:
            remedy = "use --labels none"
        elif not columns:
            remedy += ", see --labels"
        raise ShardError(
            f"the label columns are {[c.name for c in columns]}, the shard folder's other splits have {list(by_name)}: "
            f"{remedy}, or use another OUT"
        )
    for column in columns:
        extra = sorted(set(column.classes) - set(by_name[column.name].classes))
        if extra:
            raise ShardError(
                f"label column '{column.name}': class {extra[0]!r} ({len(extra)} unknown in all) is not among the "
                f"{len(by_name[column.name].classes)} classes of the shard folder's other splits: "
                "make the split that has all classes first, or use another OUT"
            )
    return [by_name[column.name] for column in columns]


def _estimated_bytes(samples: SampleTable, resize: int | None, components: int) -> int:
    """Return the estimated size of all samples in tars (bytes)."""
    # At quality 90 photographs take about two bits per pixel; their most frequent aspect is 4/3.
    most = None if resize is None else int(resize * resize * 4 / 3 / 4)
    return samples.bytes_of_files(most) + len(samples) * components * 2 * TAR_BLOCK


def _digest(samples: SampleTable, key_length: int, columns: list[Column]) -> str:
    digest = hashlib.sha256(repr([(column.name, column.classes) for column in columns]).encode())
    for key, image_size, labels, mask_size in samples.contents():
        digest.update(repr((fit_key(key, key_length), image_size, labels, mask_size)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Subset:
    """Subset of a source: sorted unique image names from a text file."""

    file: Path
    names: list[str]

    @property
    def description(self) -> str:
        """Number of names and their hash, for the settings in the manifest."""
        digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{len(self.names):,} names, SHA-256 {digest[:16]}"

    def of(self, listing: SampleList, source: str) -> SampleList:
        """Return the list reduced to the subset's images, in the list's order and with all its classes.

        A name matches an image where one of the two paths ends with the other, folder by folder, without extensions
        like .JPEG: `n01440764/n01440764_44.JPEG` matches `n01440764_44`. Raise ShardError for names that match no image
        and for a name that matches several.
        """
        by_file: dict[str, list[tuple[list[str], Sample]]] = defaultdict(list)
        file_names = {path[-1] for name in self.names for path in _readings(name)}
        for sample in listing.samples:
            path = unquote(sample.key, errors="surrogateescape").split("/")
            if path[-1] in file_names:
                by_file[path[-1]].append((path, sample))
        chosen: set[str] = set()
        missing = []
        for name in self.names:
            samples = _fitting(name, by_file)
            if len(samples) > 1:
                first, second = samples[0].image.name, samples[1].image.name
                raise ShardError(f"{self.file}: {name} matches {first} and {second} of {source}: name its folder too")
            chosen.update(sample.key for sample in samples)
            if not samples:
                missing.append(name)
        if missing:
            raise ShardError(
                f"{self.file}: {len(missing):,} of {len(self.names):,} names are not in {source} "
                f"(first: {', '.join(missing[:3])}): use the list that belongs to this source"
            )
        inside = np.fromiter((key in chosen for key in listing.samples.read_keys()), bool, len(listing.samples))
        return replace(listing, samples=listing.samples.take(np.flatnonzero(inside)))


def read_subset(file: Path) -> Subset:
    """Read one name per line, without leading slashes and empty lines. Raise ShardError for a missing or empty file."""
    if not file.is_file():
        raise ShardError(f"--subset {file}: no such file; correct the path")
    lines = os.fsdecode(file.read_bytes()).splitlines()
    names = sorted({line.strip().lstrip("/") for line in lines} - {""})
    if not names:
        raise ShardError(f"--subset {file} is empty: it must have one image name per line")
    return Subset(file, names)


def _fitting(name: str, by_file: dict[str, list[tuple[list[str], Sample]]]) -> list[Sample]:
    for path in _readings(name):
        fits = [(its, sample) for its, sample in by_file.get(path[-1], ()) if _ends_alike(path, its)]
        if fits:
            exact = [sample for its, sample in fits if its == path]
            return exact or [sample for _, sample in fits]
    return []


def _readings(name: str) -> tuple[list[str], list[str]]:
    """Split a name into its folders, without and with its extension: text after a dot may belong to the name."""
    return os.path.splitext(name)[0].split("/"), name.split("/")


def _ends_alike(one: list[str], other: list[str]) -> bool:
    shorter = min(len(one), len(other))
    return one[-shorter:] == other[-shorter:]

"""What will be in which shard. It follows from the source and the settings alone, before any image is read.

That is what makes the result the same for any number of workers, and after any number of kills: a shard is a function
of its place in the plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.listing import Listing, Sample, fit_key
from shards.manifest import Column, ShardError
from shards.rejection import Rejection

NAME_LENGTH = 100
"""Bytes that a tar header has for a member's name."""

TAR_BLOCK = 512


@dataclass(frozen=True)
class Cut:
    """How the samples are divided into shards, all of them with the same number of samples but for one."""

    shard_mb: float = 64.0
    """Size of a shard, roughly, in millions of bytes."""
    min_shards: int = 8
    """Make at least that many shards (where there are that many samples), for the loaders of as many processes."""


@dataclass(frozen=True)
class Plan:
    """`samples` in their shuffled order; shard number i holds those from `bounds[i]` to `bounds[i + 1]`."""

    columns: list[Column]
    masks: bool
    samples: list[Sample]
    bounds: list[int]
    rejections: list[Rejection]
    hidden: int
    estimated_bytes: int
    digest: str
    """SHA-256 of all keys, sizes and labels in the source's order."""

    @property
    def read(self) -> int:
        """Everything the source gave: samples and rejections."""
        return len(self.samples) + len(self.rejections)

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1

    def shard(self, index: int) -> list[Sample]:
        return self.samples[self.bounds[index] : self.bounds[index + 1]]


def make_plan(listing: Listing, known: list[Column] | None, seed: int, resize: int | None, cut: Cut) -> Plan:
    """Shorten long keys, reject the later of two equal ones, shuffle all samples, cut them into shards.

    `known`: the label columns of the folder's other splits, whose classes are then taken over. Raises ShardError where
    these do not cover the listing's, and for a source without samples.
    """
    if not listing.samples:
        first = f" (first: {listing.rejections[0].path} {listing.rejections[0].reason})" if listing.rejections else ""
        raise ShardError(f"the source holds no samples; {len(listing.rejections)} rejected{first}")
    columns = listing.columns if known is None else _agree(listing.columns, known)
    components = [column.component for column in columns] + ["jpg"] + ["mask.png"] * listing.masks
    unique, duplicates = _reject_duplicates(listing.samples, NAME_LENGTH - 1 - max(map(len, components)))
    digest = _digest(unique, columns)
    order = np.random.default_rng(seed).permutation(len(unique))
    size = _size_estimate(resize, len(components))
    total = sum(size(sample) for sample in unique)
    wanted = max(round(total / (cut.shard_mb * 1e6)), cut.min_shards, 1)
    bounds = np.linspace(0, len(unique), min(wanted, len(unique)) + 1).astype(int).tolist()
    return Plan(
        columns,
        listing.masks,
        [unique[place] for place in order],
        bounds,
        listing.rejections + duplicates,
        listing.hidden,
        total,
        digest,
    )


def _reject_duplicates(samples: list[Sample], key_length: int) -> tuple[list[Sample], list[Rejection]]:
    kept: dict[str, Sample] = {}
    duplicates = []
    for sample in samples:
        key = fit_key(sample.key, key_length)
        first = kept.setdefault(key, sample if key == sample.key else sample._replace(key=key))
        if first.image is not sample.image:
            duplicates.append(Rejection(sample.image.name, f"has the key '{key}' of {first.image.name}"))
    return list(kept.values()), duplicates


def _agree(columns: list[Column], known: list[Column]) -> list[Column]:
    """The known columns, in the listing's order: splits of one folder must number their classes alike."""
    by_name = {column.name: column for column in known}
    if set(by_name) != {column.name for column in columns}:
        raise ShardError(
            f"the label columns are {[c.name for c in columns]}, the shard folder's other splits have {list(by_name)}: "
            "make all splits from sources with the same labels, or use another OUT"
        )
    for column in columns:
        extra = sorted(set(column.classes) - set(by_name[column.name].classes))
        if extra:
            raise ShardError(
                f"label column '{column.name}': class {extra[0]!r} ({len(extra)} such) is not among the "
                f"{len(by_name[column.name].classes)} classes of the shard folder's other splits: "
                "make the split that has all classes first, or use another OUT"
            )
    return [by_name[column.name] for column in columns]


def _size_estimate(resize: int | None, components: int) -> Callable[[Sample], int]:
    """Bytes that a sample will take in its tar. Known beforehand for kept files, guessed for resized ones."""
    # At quality 90 photographs take about two bits a pixel; 4/3 is their usual shape.
    most = float("inf") if resize is None else resize * resize * 4 / 3 / 4
    overhead = components * 2 * TAR_BLOCK

    def size(sample: Sample) -> int:
        return int(min(sample.image.size, most)) + (sample.mask.size if sample.mask else 0) + overhead

    return size


def _digest(samples: list[Sample], columns: list[Column]) -> str:
    digest = hashlib.sha256(repr([(column.name, column.classes) for column in columns]).encode())
    for sample in samples:
        mask = sample.mask.size if sample.mask else None
        digest.update(repr((sample.key, sample.image.size, sample.labels, mask)).encode())
    return digest.hexdigest()

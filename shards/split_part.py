"""Exact part of a split: some images that are held out from it, or all others.

A part has the tars of its split, with indexes that list its images only; so it needs no copy of an image, and a split
of one tar has parts too. Which images are held out is a function of their keys and number alone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from shards.errors import ShardError
from shards.format import Manifest, format_index_lines, index_lines, parse_sample
from shards.hold_out import key_position


@dataclass(frozen=True)
class SplitPart:
    """Images of a split: the `held_out` ones of lowest key_position, or with `others` all but these."""

    held_out: int
    """Number of images that are held out, at least 1 and fewer than the split has."""
    others: bool


class TrainingParts(NamedTuple):
    """Parts of a training split."""

    training: SplitPart | None = None
    """Images that are trained on; None: all."""
    selection: SplitPart | None = None
    """Images that are held out, by which a choice is made; None: there is none."""

    @classmethod
    def holding_out(cls, count: int) -> TrainingParts:
        """Return the parts of a split of which `count` images are held out."""
        return cls(SplitPart(count, others=True), SplitPart(count, others=False))


ALL_IMAGES = TrainingParts()
"""A training split without a selection."""


class PartTar(NamedTuple):
    """Tar of a split, and its images that are read."""

    number: int
    """Number of the tar in the manifest."""
    samples: int
    """Number of images that are read, at least 1."""
    index_file: Path
    """Index that lists these images."""


class PartIndexes:
    """Indexes of a part's images, in a temporary folder that exists as long as this object."""

    def __init__(self, folder: Path, manifest: Manifest, part: SplitPart) -> None:
        """Write the indexes. folder: that of the shards.

        Raise ShardError for a damaged index, and where the split has no more images than are held out.
        """
        self.part = part
        if not 1 <= part.held_out < manifest.samples:
            raise ShardError(
                f"{folder}: split '{manifest.split}' has {manifest.samples:,} images, of which {part.held_out:,} "
                "cannot be held out; hold out at least one and leave at least one"
            )
        scratch = TemporaryDirectory(prefix="iwm-part-")
        weakref.finalize(self, scratch.cleanup)
        paths = [folder / shard.index for shard in manifest.shards]
        lines = [index_lines(path.read_bytes(), path) for path in paths]
        keys = [parse_sample(line, path)[0].key for path, tar in zip(paths, lines, strict=True) for line in tar]
        selected = _selected(keys, part)
        self.tars: list[PartTar] = []
        first = 0
        for number, tar in enumerate(lines):
            kept = [line for line, keep in zip(tar, selected[first : first + len(tar)], strict=True) if keep]
            first += len(tar)
            # DALI refuses an index without samples.
            if kept:
                index = Path(scratch.name) / manifest.shards[number].index
                index.write_bytes(format_index_lines(kept))
                self.tars.append(PartTar(number, len(kept), index))


def _selected(keys: list[str], part: SplitPart) -> list[bool]:
    """Return True for every key of an image of the part."""
    positions = np.array([key_position(key) for key in keys])
    held = np.zeros(len(keys), bool)
    held[np.argsort(positions, kind="stable")[: part.held_out]] = True
    selected: list[bool] = (held != part.others).tolist()
    return selected

"""Splits `train` and `val` of one source. The split of a sample is a function of its key and the fraction alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shards.errors import ShardError
from shards.listing import SampleList

TRAIN, VAL = "train", "val"
"""Names of the splits."""


def key_position(key: str) -> float:
    """Return a number from 0 to 1, uniform over keys: the first 8 bytes of the key's SHA-256, big-endian, over 2⁶⁴."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def hold_out(listing: SampleList, fraction: float) -> dict[str, SampleList]:
    """Divide a list: `val` has the samples whose key_position is below `fraction`, `train` all others.

    Both have the label columns of the whole list; its rejections and hidden files count to `train`. `val` comes first:
    if the splits are made in this order, a folder with the split `train` has both. Raise ShardError where one of them
    would have no samples.
    """
    samples = listing.samples
    positions = np.fromiter(map(key_position, samples.read_keys()), np.float64, len(samples))
    held = positions < fraction
    parts = {
        VAL: replace(listing, samples=samples.take(np.flatnonzero(held)), rejections=[], hidden=0),
        TRAIN: replace(listing, samples=samples.take(np.flatnonzero(~held))),
    }
    empty = next((split for split, part in parts.items() if not part.samples), None)
    if empty and len(samples):
        raise ShardError(
            f"--val-fraction {fraction} leaves no image for '{empty}', of {len(positions):,} in all: "
            f"{_sufficient(positions, empty)}"
        )
    return parts


def _sufficient(positions: NDArray[np.float64], empty: str) -> str:
    """Return the remedy: a fraction, with few digits, that leaves one image for the split `empty`."""
    distinct = np.unique(positions).tolist()
    if len(distinct) < 2:
        return "omit it, or add images"
    low, high = distinct[:2] if empty == VAL else distinct[-2:]
    rounded = (round((low + high) / 2, digits) for digits in range(1, 18))
    return f"use {next(value for value in rounded if low < value <= high)}, or add images"

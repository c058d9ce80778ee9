"""Derived seeds: independent random streams for neighbouring seeds, ranks and epochs."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int, bits: int = 31) -> int:
    """Derive one seed of `bits` bits (at most 64) from all `parts`. DALI's seeds have 31 bits, torch's 63."""
    return derive_seeds(1, *parts, bits=bits)[0]


def derive_seeds(count: int, *parts: int, bits: int = 31) -> list[int]:
    """Derive `count` independent seeds of `bits` bits (at most 64) from all `parts`."""
    width, kind = (32, np.uint32) if bits <= 32 else (64, np.uint64)
    # Shift Python integers, because numpy 1 cannot shift a uint64 by a Python integer.
    return [word >> (width - bits) for word in np.random.SeedSequence(parts).generate_state(count, kind).tolist()]

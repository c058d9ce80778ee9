"""What a user of the benchmarks can get wrong."""

from __future__ import annotations


class BenchmarkError(ValueError):
    """A benchmark that cannot be run; the message names the option and the remedy."""

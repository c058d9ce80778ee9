"""Ranges of settings, annotated on dataclass fields: `steps: Annotated[int, Range(min=1)] = 100`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from shards.errors import UserError


class ConfigError(UserError, ValueError):
    """Invalid configuration; the message names the field and the remedy."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, or of every number of a tuple: `min` and `max` are inclusive, `above` and `below` exclusive.

    NaN is outside every range.
    """

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.min is None or number >= self.min)
            and (self.max is None or number <= self.max)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.min is not None and self.max is not None:
            return f"from {self.min} to {self.max}"
        bounds = (("at least", self.min), ("above", self.above), ("at most", self.max), ("below", self.below))
        return " and ".join(
            "finite" if bound == math.inf else f"{word} {bound}" for word, bound in bounds if bound is not None
        )


def check_ranges(settings: Any, prefix: str = "--") -> None:
    """Raise ConfigError for the first field of a dataclass, or of a nested one, that is outside its Range.

    `prefix`: prefix of the field name in the message; with "--" the name is that of the tyro option, with dashes.
    Fields without a Range and None values are valid.
    """
    ranges = _ranges(settings.__class__)
    for field in fields(settings):
        value = getattr(settings, field.name)
        name = prefix + (field.name.replace("_", "-") if prefix.startswith("--") else field.name)
        if is_dataclass(value):
            check_ranges(value, f"{name}.")
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        bounds = ranges.get(field.name)
        if bounds is not None and not all(number is None or number in bounds for number in numbers):
            verb = "each must" if isinstance(value, tuple) else "must"
            raise ConfigError(f"{name} {' '.join(map(str, numbers))}: {verb} be {bounds}")


def _ranges(kind: type) -> dict[str, Range]:
    """Return ranges by field; a subclass that redeclares a field with another default inherits its Range."""
    return {
        name: bounds
        for base in reversed(kind.__mro__)
        for name, hint in get_type_hints(base, include_extras=True).items()
        for bounds in getattr(hint, "__metadata__", ())
        if isinstance(bounds, Range)
    }

"""Configurations as plain types and YAML, and differences between settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from cattrs import ClassValidationError, transform_error
from cattrs.preconf.pyyaml import make_converter

from iwm.config import Config, ConfigError

_converter = make_converter(forbid_extra_keys=True)
_converter.register_structure_hook(Path, lambda value, _: Path(value))
_converter.register_unstructure_hook(Path, str)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested plain types, for YAML and checkpoints."""
    return _converter.unstructure(config)


def from_dict(raw: dict[str, Any]) -> Config:
    """Rebuild a configuration from `to_dict`'s result. Raises ConfigError, which names unknown keys and wrong types."""
    if not isinstance(raw, dict):
        raise ConfigError(f"it has no sections but is a {type(raw).__name__}")
    try:
        return _converter.structure(raw, Config)
    except ClassValidationError as error:
        raise ConfigError("; ".join(transform_error(error))) from error


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_yaml(text: str) -> Config:
    return from_dict(yaml.safe_load(text))


def config_diff(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two configurations differ, as {"section.field": (one, other)}."""
    return flat_diff(_flatten(to_dict(one)), _flatten(to_dict(other)))


def flat_diff(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the entries in which two flat mappings differ, as {name: (one, other)}, with None for a missing name."""
    names = dict.fromkeys((*one, *other))
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def split_changes(
    changed: Mapping[str, tuple[Any, Any]], allowed: Collection[str]
) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]:
    """Split changed settings into those that are allowed on resume and those that are refused.

    allowed: names, or prefixes that end in `.` or `_`.
    """
    prefixes = tuple(name for name in allowed if name.endswith((".", "_")))
    accepted = {name: pair for name, pair in changed.items() if name in allowed or name.startswith(prefixes)}
    return accepted, {name: pair for name, pair in changed.items() if name not in accepted}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat

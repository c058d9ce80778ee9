"""In what runs differ, and which of them are one arm: the same but for the seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from iwm.config import ConfigError, differences, from_yaml
from iwm.report.run_folder import ReportError, Run

SEED = "train.seed"


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed."""

    name: str
    runs: list[Run]


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The fields of the configuration that are not the same in all runs, each with every run's value.

    Runs without a configuration are left out of the comparison and have None. Raises ReportError for a config.yaml
    that is none.
    """
    configs = {}
    for run in runs:
        if run.config is not None:
            try:
                configs[run.name] = from_yaml(run.config)
            except (ConfigError, yaml.YAMLError) as error:
                message = " ".join(str(error).split())
                raise ReportError(
                    f"{run.folder / 'config.yaml'}: {message}; leave this run out, or mend the file"
                ) from error
    if not configs:
        return {}
    first = next(iter(configs.values()))
    changed = {name: differences(first, config) for name, config in configs.items()}
    # In the configuration's own order, not in that of the runs.
    ours = {field: pair[0] for fields in changed.values() for field, pair in fields.items()}
    return {
        field: [changed[run.name].get(field, (None, value))[1] if run.name in changed else None for run in runs]
        for field, value in ours.items()
    }


def arms(runs: Sequence[Run]) -> list[Arm]:
    """The runs by arm, in their order.

    A run is an arm of its own without a configuration, and where another has the same one, seed and all: then they
    differ in something that is not known here.
    """
    fields = differing(runs)
    seeds = fields.pop(SEED, [None] * len(runs))
    keys = [
        repr([values[i] for values in fields.values()]) if run.config is not None else run.name
        for i, run in enumerate(runs)
    ]
    seen = list(zip(keys, seeds, strict=True))
    doubtful = {key for key, seed in seen if seen.count((key, seed)) > 1}
    groups: dict[str, list[Run]] = {}
    for key, run in zip(keys, runs, strict=True):
        groups.setdefault(run.name if key in doubtful else key, []).append(run)
    return [Arm(_name(group), group) for group in groups.values()]


def _name(group: list[Run]) -> str:
    """What the names of an arm's runs have in common: all but the number at their end and the word before it."""
    if len(group) == 1:
        return group[0].name
    names = {re.sub(r"[-_. /]*(s|seed)?[-_. ]*\d+$", "", run.name) for run in group}
    common = names.pop() if len(names) == 1 else ""
    return f"{common or group[0].name + ' …'} ({len(group)} seeds)"

"""Results of runs, read from config.yaml, run.json, metrics.jsonl and eval/*.json in the run folder.

Also the differences of runs, and groups of runs that differ only in their seed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from iwm.config import Config, ConfigError
from iwm.config_io import config_diff, from_yaml
from iwm.report.short_paths import short_path, short_paths
from iwm.training.checkpoint import list_checkpoints
from iwm.training.run_record import read_record
from shards.errors import UserError, one_line

Point = tuple[float, float]
"""(step, value)"""


@dataclass(frozen=True)
class RunResults:
    """Configuration, metrics and evaluations of one run."""

    folder: Path
    name: str
    """Folder name, with enough of its path to be unique in a comparison."""
    config: str | None
    """Text of config.yaml."""
    metrics: dict[str, list[Point]]
    """Numeric fields of metrics.jsonl as (step, value), with rising steps and finite values."""
    evaluations: dict[str, dict[str, Any]]
    """Content of eval/*.json by file name without suffix. Absolute paths in it are shortened (short_paths.py)."""
    record: dict[str, Any] | None = None
    """Content of run.json: where and how the run was trained; None for a run of an older version."""
    not_finite: dict[str, int] = field(default_factory=dict)
    """Number of values that were not finite, by field of metrics.jsonl; only fields with such values."""

    def parse_config(self) -> Config | None:
        """Return the configuration, None without config.yaml. Raises ReportError for an invalid one."""
        if self.config is None:
            return None
        try:
            return from_yaml(self.config)
        except (ConfigError, yaml.YAMLError) as error:
            message = one_line(error)
            raise ReportError(f"{self.folder / 'config.yaml'}: {message}; omit this run or fix the file") from error

    def evaluations_of(self, protocol: str) -> dict[str, dict[str, Any]]:
        return {name: result for name, result in self.evaluations.items() if result["protocol"] == protocol}


class ReportError(UserError):
    """Run folder or result that cannot be read; the message names the file and the remedy."""


def read_runs(folders: Sequence[Path]) -> list[RunResults]:
    """Read runs to compare. Raises the ReportError of `read_run`, and ReportError for a folder that is given twice."""
    paths = [folder.resolve() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise ReportError(f"{folder} is given twice; name each run once")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        above = os.path.commonpath([path.parent for path in paths])
        names = [str(path.relative_to(above)) for path in paths]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str | None = None) -> RunResults:
    """Read a run folder. Raises ReportError for a missing folder or a malformed file."""
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; name a run folder, for example runs/demo")
    config = folder / "config.yaml"
    evaluations = {}
    for path in sorted((folder / "eval").glob("*.json"), key=lambda path: path.stem):
        evaluations[path.stem] = short_paths(read_result(path))
    lines = _metric_lines(folder / "metrics.jsonl")
    return RunResults(
        folder=folder,
        name=name or folder.resolve().name,
        config=config.read_text() if config.exists() else None,
        metrics=_finite_points(lines),
        evaluations=evaluations,
        record=read_record(folder),
        not_finite=_count_null(lines),
    )


def read_result(path: Path) -> dict[str, Any]:
    """Read one evaluation result. Raises ReportError, which names the file, where it is none."""
    try:
        result = json.loads(path.read_bytes())
        return {**result, "protocol": result["protocol"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is not an evaluation result ({error}); delete it or evaluate again") from error


def is_up_to_date(evaluation: Path, run: Path) -> bool:
    """Return True if the evaluation file exists and is newer than the run's newest checkpoint."""
    checkpoints = list_checkpoints(run)
    return evaluation.exists() and bool(checkpoints) and evaluation.stat().st_mtime >= checkpoints[0].stat().st_mtime


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """Return numeric fields as (step, value), empty without a file. Raises ReportError for a malformed line."""
    return _finite_points(_metric_lines(path))


def _finite_points(lines: Sequence[dict[str, Any]]) -> dict[str, list[Point]]:
    by_name: dict[str, dict[float, float]] = {}
    for fields in lines:
        for name, value in fields.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                by_name.setdefault(name, {})[fields["step"]] = value  # a resumed run repeats steps; the later counts
    return {name: sorted(points.items()) for name, points in by_name.items()}


def _count_null(lines: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the number of null values, which stand for values that were not finite, by field."""
    return dict(Counter(name for fields in lines for name, value in fields.items() if value is None))


def _metric_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for i, text in enumerate(lines, start=1):
        try:
            fields = json.loads(text)
            found.append({**fields, "step": fields["step"]})
        except (ValueError, KeyError, TypeError) as error:
            if i == len(lines):
                break  # incomplete last line of a running or killed process
            raise ReportError(f"{path} line {i} is not valid ({error}); delete that line") from error
    return found


SEED = "train.seed"


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in their seed."""

    name: str
    runs: list[RunResults]


def differing_fields(runs: Sequence[RunResults]) -> dict[str, list[Any]]:
    """Return the configuration fields that differ between runs, with one value per run.

    Runs without a configuration have None. Raises ReportError for an invalid config.yaml.
    """
    configs = {run.name: config for run in runs if (config := run.parse_config()) is not None}
    if not configs:
        return {}
    first = next(iter(configs.values()))
    changed = {name: config_diff(first, config) for name, config in configs.items()}
    # In the order of the configuration.
    ours = {field: pair[0] for fields in changed.values() for field, pair in fields.items()}
    return {
        field: [changed[run.name].get(field, (None, value))[1] if run.name in changed else None for run in runs]
        for field, value in ours.items()
    }


def setting_text(value: Any) -> str:
    """Return the value of a configuration field as text, without absolute paths; – for None."""
    if value is None:
        return "–"
    return " to ".join(map(str, value)) if isinstance(value, list) else short_path(str(value))


def group_by_seed(runs: Sequence[RunResults]) -> list[SeedGroup]:
    """Group runs that differ only in their seed, in the order of the runs.

    A run without a configuration forms its own group. So do runs with the same configuration and seed: they differ in
    something that the configuration does not record.
    """
    fields = differing_fields(runs)
    seeds = fields.pop(SEED, [None] * len(runs))
    keys = [
        repr([values[i] for values in fields.values()]) if run.config is not None else run.name
        for i, run in enumerate(runs)
    ]
    seen = list(zip(keys, seeds, strict=True))
    duplicated = {key for key, seed in seen if seen.count((key, seed)) > 1}
    groups: dict[str, list[RunResults]] = {}
    for key, run in zip(keys, runs, strict=True):
        groups.setdefault(run.name if key in duplicated else key, []).append(run)
    return [SeedGroup(_name(group), group) for group in groups.values()]


def _name(group: list[RunResults]) -> str:
    """Return the common name of a group's runs, without the seed number at their end."""
    if len(group) == 1:
        return group[0].name
    names = {re.sub(r"[-_. /]*(s|seed)?[-_. ]*\d+$", "", run.name) for run in group}
    common = names.pop() if len(names) == 1 else ""
    return f"{common or group[0].name + ' …'} ({len(group)} seeds)"

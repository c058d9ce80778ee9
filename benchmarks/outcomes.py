"""The results of a checklist: OUT/checklist.json, renewed after each check."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mistakes import BenchmarkError

from shards.atomic import write_atomically

RUNNING = "running"
"""Ending of a check that was cut off with the checklist itself."""


class Outcomes:
    """Each check's outcome, and the configuration and machine of all of them."""

    def __init__(self, file: Path, tiny: bool, machine: dict[str, Any]) -> None:
        self.checks: dict[str, dict[str, Any]] = {}
        self._file = file
        self._configuration = configuration(tiny, machine)
        self._content = {"configuration": self._configuration, "machine": machine, "checks": self.checks}

    def resume(self, fresh: bool) -> None:
        """Take over the outcomes in the file, if there is one.

        Raises BenchmarkError where the file cannot be read or belongs to another configuration. fresh: then begin with
        no outcomes instead.
        """
        if not self._file.exists():
            return
        remedy = "name another OUT, or repeat all checks with --fresh"
        try:
            content = json.loads(self._file.read_text())
            then, found = content["configuration"], content["checks"]
        except (json.JSONDecodeError, KeyError) as error:
            if fresh:
                return
            raise BenchmarkError(f"{self._file}: not the results of this checklist ({error!r}); {remedy}") from error
        now = self._configuration
        if different := [name for name in now if then.get(name) != now[name]]:
            if fresh:
                return
            changes = ", ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in different)
            raise BenchmarkError(f"{self._file}: its results have another configuration: {changes}; {remedy}")
        self.checks |= found

    def forget(self, names: Iterable[str]) -> None:
        """Drop the outcomes of these checks, so that they are repeated."""
        for name in names:
            self.checks.pop(name, None)

    def record(self, name: str, outcome: dict[str, Any]) -> None:
        """Set one check's outcome and renew the file, so that a machine that goes away takes nothing along."""
        self.checks[name] = outcome
        write_atomically(self._file, (json.dumps(self._content, indent=1) + "\n").encode())


def configuration(tiny: bool, machine: dict[str, Any]) -> dict[str, Any]:
    """The facts that results of one checklist share."""
    packages = {name: found for name, found in machine["packages"].items() if "torch" in name or "dali" in name}
    same = ("commit", "gpu", "processor", "cores", "python")
    return {"tiny": tiny, **{name: machine[name] for name in same}, **packages}

"""Attempt at a task inside a Ray worker: check of its node, then the work, with progress as running totals.

Ray imports this module on nodes before they are checked, so it needs the standard library alone.
"""

from __future__ import annotations

import os
import pickle
import platform
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shards.errors import ShardError

TOTALS_EVERY = 2.0
"""Time between two progress reports of an attempt (seconds): all of a cluster's reports go through one process."""


@dataclass(frozen=True)
class NodeRequirements:
    """State of a node in which its shards are those of the driver's node."""

    check_file: Path
    """Absolute path of a file that the driver has made in the shard folder for this run."""
    working_folder: str
    """The driver's, to which paths can be relative."""
    codecs: dict[str, str]
    """Versions of the packages that pixels depend on."""

    def check(self) -> None:
        """Enter the working folder where there is one. Raise ShardError where the node lacks something else."""
        node = platform.node()
        if not os.path.exists(self.check_file):  # False, not an error, where a folder above it cannot be read
            raise ShardError(
                f"node {node} does not see {self.check_file.parent}, or the run that made it has ended: "
                "OUT must be a folder that all nodes share"
            )
        from shards.images import codec_versions  # the node may lack what it imports

        found = codec_versions()
        for package, version in self.codecs.items():
            if found[package] != version:
                raise ShardError(
                    f"node {node} has {package} {found[package]}, this machine {version}, which may give other bytes: "
                    "install the same version on all nodes"
                )
        with suppress(OSError):  # where it is missing, paths that are relative to it cannot be read, and say so
            os.chdir(self.working_folder)


def attempt_task(requirements: NodeRequirements, work: bytes, task: bytes) -> Generator[tuple[int, int], None, None]:
    """Run a pickled function on a pickled task; yield how many samples are done so far, and how many of them are bad.

    The last totals are those of the whole task. Raise ShardError for a node that does not meet the requirements.
    """
    try:
        requirements.check()
        reports = pickle.loads(work)(pickle.loads(task))
    except ImportError as error:
        raise ShardError(
            f"node {platform.node()} cannot import {error.name}: install on all nodes what this machine has"
        ) from error
    done, bad, reported = 0, 0, time.monotonic()
    for report in reports:
        done, bad = done + report.done, bad + report.bad
        if time.monotonic() - reported > TOTALS_EVERY:
            reported = time.monotonic()
            yield done, bad
    yield done, bad

"""RUN/run.json: where, when and with which program a run was trained.

A segment is the work of one start of the training command: from step 0 or a checkpoint to its end. The main process
writes its segment at the start and at every checkpoint, so that a killed run has a record up to its last checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from iwm.training.checkpoint import versions
from iwm.training.runtime import device_name
from shards.atomic import write_atomically
from shards.errors import UserError
from shards.workers import available_cores

RECORD = "run.json"


class RunRecordError(UserError):
    """Malformed run.json; the message names the file and the remedy."""


class RunRecord:
    """Record of a run in training, with the segment of this process as its last one."""

    def __init__(
        self, run: Path, *, step: int, device: torch.device, processes: int, images: int, parameters: dict[str, int]
    ) -> None:
        """Append a segment that starts after `step` and write the file. Raises RunRecordError for a malformed file.

        processes: number of training processes. images: samples per epoch. parameters: number of trained parameters of
        `encoder` and `predictor`.
        """
        self._path, self._began = run / RECORD, time.monotonic()
        earlier = (read_record(run) or {"segments": []})["segments"]
        # Steps that a resumed run repeats count for the later segment.
        kept = [{**part, "last_step": min(part["last_step"], step)} for part in earlier if part["first_step"] < step]
        self._segment: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "first_step": step,
            "last_step": step,
            "seconds": 0.0,
            "device": device_name(device),
            "processes": processes,
            "cores": available_cores(),
            "commit": source_commit(Path(__file__).parents[2]),
            "versions": versions(),
        }
        self._content = {"images": images, "parameters": parameters, "segments": [*kept, self._segment]}
        self._write()

    def update(self, step: int) -> None:
        """Write that the segment has reached `step`. Raises OSError where the file cannot be written."""
        self._segment |= {"last_step": step, "seconds": round(time.monotonic() - self._began, 1)}
        self._write()

    def _write(self) -> None:
        write_atomically(self._path, (json.dumps(self._content, indent=1) + "\n").encode())


def read_record(run: Path) -> dict[str, Any] | None:
    """Return the content of RUN/run.json; None for a run without one. Raises RunRecordError for a malformed file."""
    path = run / RECORD
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        return {
            "images": int(content["images"]),
            "parameters": dict(content["parameters"]),
            "segments": [_complete(segment) for segment in content["segments"]],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise RunRecordError(f"{path} is not a record of a run ({error!r}); delete it") from error


def _complete(segment: dict[str, Any]) -> dict[str, Any]:
    """Return a segment. Raises KeyError where it lacks a field."""
    names = ("started", "first_step", "last_step", "seconds", "device", "processes", "cores", "commit", "versions")
    return {name: segment[name] for name in names}


def source_commit(folder: Path, modified: str = ", modified") -> str | None:
    """Return the commit of the source in `folder`, with `modified` after it where tracked files differ from it.

    None where the folder is not the root of a git checkout, or git is not installed.
    """
    if not (folder / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", f"--dirty={modified}"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

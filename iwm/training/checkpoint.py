"""Atomic checkpoints for exact resume.

Each file is written under a temporary name, fsynced and renamed; only then are older checkpoints deleted. A kill -9 or
a full disk at any moment loses at most the steps since the last checkpoint. Files hold plain types and tensors and are
read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dali_pipelines import DALI_PACKAGES
from iwm.config import Config
from iwm.config_io import from_dict, to_dict
from iwm.models.world_model import WorldModel
from shards.atomic import sync_folder
from shards.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


class CheckpointFormatError(CheckpointError):
    """An undamaged file of another kind, or of another version of this program."""


def save_atomic(path: Path, content: dict[str, Any]) -> None:
    """Write plain types and tensors to `path` atomically: temporary file, fsync, rename.

    Raises OSError where that fails; an older file of this name stays untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch's zip writer reports a failed write as a RuntimeError.
        raise OSError(f"{path} could not be written ({error}); older checkpoints are untouched") from error
    sync_folder(path.parent)


def load_verified(path: Path, expected_format: int | str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a file of `save_atomic` and check its field `format`, which is removed.

    Raises CheckpointError where the file is missing or damaged, CheckpointFormatError where its format is another.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; correct the path")
    try:
        # torch reads past damage inside a tensor; the archive's checksums do not.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not match")
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged or is not a checkpoint ({error})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of this program (no field 'format'); choose another file")
    found = content.pop("format")
    if isinstance(found, int) and isinstance(expected_format, int) and found < expected_format:
        raise CheckpointFormatError(
            f"{path} was written by an older version of this program (format {found}, not {expected_format}); use it "
            "with that version, or train again in another folder"
        )
    if found != expected_format:
        raise CheckpointFormatError(
            f"{path} is another kind of file, or was written by another version of this program (format {found}, not "
            f"{expected_format}); read it with the version that wrote it, or choose another file"
        )
    return content


def file_digest(path: Path) -> str:
    """Return 16 hex digits of a SHA-256: of the file's bytes, or of the names, CRCs and sizes in a zip archive."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [(part.filename, part.CRC, part.file_size) for part in archive.infolist()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


FORMAT = 2
"""Version of the file format. It increases when older checkpoints become unreadable: 2 renamed configuration fields."""


@dataclass
class Checkpoint:
    """Content of a checkpoint file."""

    config: Config
    step: int
    """Number of completed optimiser steps."""
    samples: int
    """Number of images trained on, over all processes."""
    skipped: int
    """Number of steps skipped because of a non-finite gradient."""
    model: dict[str, torch.Tensor]
    """State dict of context encoder, predictor and target encoder."""
    optimizer: dict[str, Any]
    """Optimiser state in the format of optim.optimizer_state_dict."""
    rng: dict[str, torch.Tensor]
    loader: dict[str, Any]
    """Seed and, by rank, the state of every process's pipeline."""
    versions: dict[str, str]

    @classmethod
    def gathered(cls, content: dict[str, Any], loaders: list[Any]) -> Checkpoint:
        """Return a checkpoint of all processes: the fields of one process's, and the pipelines' states by rank."""
        return cls(**{**content, "loader": {**content["loader"], "ranks": loaders}})


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a run's results."""
    found = {"python": platform.python_version()}
    for package in ("iwm", "torch", "timm", *DALI_PACKAGES, "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package not in DALI_PACKAGES:
                found[package] = "not installed as a package"
    return found


def rng_state() -> dict[str, torch.Tensor]:
    """Return the state of torch's generators. Masks are hashed, and the pipeline has its own state."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:09d}.pt"


def run_dir_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint file, or the folder that the file was copied to."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically. Raises OSError (for example, disk full); older checkpoints stay untouched."""
    path = checkpoint_path(run, checkpoint.step)
    save_atomic(path, {**vars(checkpoint), "config": to_dict(checkpoint.config), "format": FORMAT})
    return path


def prune_checkpoints(run: Path, keep_last_k: int, keep_every: int | None) -> None:
    """Delete all checkpoints except the newest `keep_last_k` and the multiples of `keep_every`, and partial files."""
    for path in list_checkpoints(run)[keep_last_k:]:
        if keep_every is None or _step_of(path) % keep_every:
            path.unlink()
    for partial in (run / "checkpoints").glob("*.partial"):
        partial.unlink()


def list_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*.pt"), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def resolve(path: Path) -> Path:
    """Return the newest checkpoint of a run folder, or the given checkpoint file itself.

    Raises CheckpointError where there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; correct the path")
    if not path.is_dir():
        return path
    found = list_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"{path} has no checkpoint in {path / 'checkpoints'}; choose a run's folder or a checkpoint file"
        )
    return found[0]


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a run's newest checkpoint or one checkpoint file (`resolve`).

    Raises CheckpointError where it is missing, damaged, or not a checkpoint of this version of the program. A run's
    older checkpoint is never used silently in place of a damaged one.
    """
    try:
        content = load_verified(resolve(path), FORMAT, device)
    except CheckpointError as error:
        if isinstance(error, CheckpointFormatError) or not list_checkpoints(path):
            raise
        raise CheckpointError(f"{error}; delete this file to resume from the checkpoint before it") from error
    return Checkpoint(**{**content, "config": from_dict(content["config"])})


def load_newest(run: Path, device: torch.device | str = "cpu") -> Checkpoint | None:
    """Return a run's newest checkpoint, or None where it has none."""
    return load_checkpoint(run, device) if list_checkpoints(run) else None


def load_world_model(path: Path, device: torch.device | str = "cpu") -> tuple[WorldModel, Config]:
    """Return a frozen model in eval mode and its configuration, from a run folder or a checkpoint file (`resolve`)."""
    checkpoint = load_checkpoint(path, device)
    model = WorldModel(checkpoint.config)
    model.load_state_dict(checkpoint.model, strict=True)
    model.setup(torch.device(device), compiled=False)
    return model.requires_grad_(False).eval(), checkpoint.config

"""Checkpoints: everything a run needs to go on exactly, whole on disk or not there at all.

A file is written beside the old ones, fsynced and renamed; only then are older ones deleted. So kill -9 or a full disk
at any moment costs at most the steps since the last one. Files hold plain types and tensors and are read with
`weights_only=True`.
"""

from __future__ import annotations

import os
import pickle
import platform
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from iwm.config import Config, from_dict, to_dict
from iwm.models.world_model import WorldModel
from shards.atomic import sync_folder

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


@dataclass
class Checkpoint:
    """What a file holds."""

    config: Config
    step: int
    """Optimiser steps taken."""
    samples: int
    """Images trained on, over all processes."""
    skipped: int
    """Steps skipped for a non-finite gradient."""
    model: dict[str, torch.Tensor]
    """Context encoder, predictor and target encoder."""
    optimizer: dict[str, Any]
    """In the format of optim.state_for_checkpoint."""
    rng: dict[str, torch.Tensor]
    loader: dict[str, Any]
    """Seed, and the pipeline state of every rank."""
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Versions of what computes a run."""
    found = {"python": platform.python_version()}
    for package in ("iwm", "torch", "timm", "nvidia-dali-cuda130", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def rng_state() -> dict[str, torch.Tensor]:
    """torch's generators, the only ones with a state: masks are hashed and the pipeline keeps its own."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def path_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:09d}.pt"


def run_of(checkpoint: Path) -> Path:
    """The run's folder of a checkpoint file, or the folder that the file was copied to."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def save(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint whole or not at all. Raises OSError (a full disk, say) with older checkpoints untouched."""
    path = path_of(run, checkpoint.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    content = {**vars(checkpoint), "config": to_dict(checkpoint.config), "format": FORMAT}
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch's zip writer reports a failed write as a RuntimeError of its own.
        raise OSError(f"{path} could not be written ({error}); older checkpoints are untouched") from error
    sync_folder(path.parent)
    return path


def prune(run: Path, keep: int, milestone_every: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the milestones, and what killed writers left."""
    for path in all_checkpoints(run)[keep:]:
        if milestone_every is None or _step_of(path) % milestone_every:
            path.unlink()
    for partial in (run / "checkpoints").glob("*.partial"):
        partial.unlink()


def all_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*.pt"), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def load(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint file. Raises CheckpointError where it is missing, damaged, or no checkpoint of this program."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        # torch reads past damage inside a tensor; the archive's checksums do not.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged or is no checkpoint ({error})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is no checkpoint of this program: it has no field 'format'")
    if content.pop("format") != FORMAT:
        raise CheckpointError(f"{path} was written by another version of this program (format is not {FORMAT})")
    return Checkpoint(**{**content, "config": from_dict(content["config"])})


def newest(run: Path, device: torch.device | str = "cpu") -> Checkpoint | None:
    """A run's newest checkpoint, or None where it has none. A damaged one is an error: nothing is silently lost."""
    paths = all_checkpoints(run)
    if not paths:
        return None
    try:
        return load(paths[0], device)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete that file to go on from the one before it") from error


def load_run(path: Path, device: torch.device | str = "cpu") -> tuple[WorldModel, Config]:
    """A trained model, ready to be used: from a run's folder (its newest checkpoint) or from a checkpoint file."""
    if path.is_dir():
        checkpoint = newest(path, device)
        if checkpoint is None:
            raise CheckpointError(f"{path} has no checkpoint in {path / 'checkpoints'}")
    else:
        checkpoint = load(path, device)
    model = WorldModel(checkpoint.config)
    model.load_state_dict(checkpoint.model, strict=True)
    model.prepare(torch.device(device), compiled=False)
    return model.requires_grad_(False).eval(), checkpoint.config

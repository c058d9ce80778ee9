"""Checkpoints: everything a run needs to go on exactly, whole on disk or not there at all.

A file is written beside the old ones, fsynced and renamed; only then are older ones deleted. So kill -9 or a full disk
at any moment costs at most the steps since the last one. Files hold plain types and tensors and are read with
`weights_only=True`.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dali_pipelines import DALI_PACKAGES
from iwm.config import Config, from_dict, to_dict
from iwm.models.world_model import WorldModel
from iwm.training.whole_file import CheckpointError as CheckpointError
from iwm.training.whole_file import read_whole, write_whole

FORMAT = 1


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
    for package in ("iwm", "torch", "timm", *DALI_PACKAGES, "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package not in DALI_PACKAGES:
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
    write_whole(path, {**vars(checkpoint), "config": to_dict(checkpoint.config), "format": FORMAT})
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
    content = read_whole(path, FORMAT, device)
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

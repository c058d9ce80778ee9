"""Files of an exported folder (iwm/export/folder.py) that both its readers and training from known weights need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from iwm.training.checkpoint import CheckpointError

FORMAT = 2
ENCODER, PREDICTOR, HEAD = "model.safetensors", "predictor.safetensors", "head.safetensors"
"""Weights. timm reads a file of the encoder's name."""
DESCRIPTION = "iwm.json"
FIRST_FORMAT = "encoder.safetensors"
"""File that only folders of format 1 contain."""


def is_export_dir(folder: Path) -> bool:
    """Return True for the folder of an exported model, complete or not."""
    return any((folder / name).exists() for name in (DESCRIPTION, PREDICTOR, FIRST_FORMAT))


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of iwm.json.

    Raises CheckpointError where it is damaged or of another version, OSError where it cannot be read.
    """
    path = folder / DESCRIPTION
    if (folder / FIRST_FORMAT).exists():
        raise CheckpointError(f"{folder} is an exported model of format 1, not {FORMAT}; export the model again")
    try:
        description: dict[str, Any] = json.loads(path.read_bytes())
        known = description["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    if not known:
        raise CheckpointError(f"{path}: its format is not {FORMAT} (another version of iwm); export the model again")
    return description


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, on the CPU. Raises CheckpointError where it is damaged, OSError where it is missing."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); export the model again") from error
    return tensors


def damaged(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a JSON file that cannot be understood."""
    return CheckpointError(f"{path} is damaged ({error!r}); export the model again")


def incomplete(folder: Path, error: OSError) -> CheckpointError:
    """Return the error for a folder without one of its files."""
    return CheckpointError(f"{folder} is not a complete exported model ({error}); export it again")

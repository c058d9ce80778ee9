"""What a protocol's training leaves in RUN/eval/NAME/: last.pt to go on from, best.pt to be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from iwm.config import ConfigError
from iwm.training.whole_file import CheckpointError, read_whole, write_whole

FORMAT = "downstream-1"
LAST, BEST = "last.pt", "best.pt"

MAY_CHANGE = (
    "output",
    "device",
    "threads",
    "compile",
    "micro_batch",
    "activation_checkpointing",
    "checkpoint_every",
    "log_every",
    "tensorboard",
    "data.threads",
    "data.prefetch",
)
"""Options that may differ when training goes on: they change no recipe. Device, compile and micro_batch change rounding
and draws, micro_batch also how many images a batch norm sees."""


def read_last(folder: Path, identity: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The training to go on with, None where there is none.

    identity: what must be the same, flat. Raises ConfigError where it is not, naming each difference; CheckpointError
    for a damaged file.
    """
    path = folder / LAST
    if not path.exists():
        return None
    try:
        content = read_whole(path, FORMAT, device)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete it to begin this training anew") from error
    then = content["identity"]
    different = [
        f"{name} {identity.get(name)} (it was {then.get(name)})"
        for name in sorted(then.keys() | identity.keys())
        if name not in MAY_CHANGE and str(then.get(name)) != str(identity.get(name))
    ]
    if different:
        raise ConfigError(
            f"{folder} holds a training with other settings: {', '.join(different)}; set them back, delete the folder, "
            "or choose another --output"
        )
    return content


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Raises OSError with the file before untouched."""
    write_whole(folder / name, {"format": FORMAT, **content})

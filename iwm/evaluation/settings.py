"""The options that every protocol has. A protocol's own `Settings` extends these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class HeldOut:
    """The images a model is judged on."""

    shards: Path | None = None
    """Folder made by tools/make_shards.py; default: the run's own (data.shards)."""
    split: str | None = None
    """A split of it; default: the run's validation split (data.val)."""


@dataclass(frozen=True)
class Settings:
    """The options that every protocol has."""

    checkpoint: Path
    """A run's folder, of which the newest whole checkpoint is taken, or one checkpoint file."""
    output: Path | None = None
    """JSON file to write; default: RUN/eval/PROTOCOL.json."""
    data: HeldOut = field(default_factory=HeldOut)
    seed: int = 0
    """Of everything drawn: the same seed asks every model the same."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`bf16`: autocast of the model; distances and ranks stay exact. `auto`: as the run was trained."""

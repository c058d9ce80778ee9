"""Image World Models: train them (iwm/train.py), judge them (iwm/evaluate.py), use them (`iwm.load`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from iwm.trained import TrainedModel

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def load(
    path: Path | str, device: torch.device | str = "cpu", encoder: Literal["target", "context"] | None = None
) -> TrainedModel:
    """Load a run's newest checkpoint, one checkpoint file, or a folder that tools/export.py wrote.

        model = iwm.load("runs/demo")
        model.pooled(images)                                         # [b, d]
        model.predict(images, model.action(brightness=+0.2))         # [b, n, d]

    encoder: which of the two; default: the target encoder, of an exported folder the one it has. Raises
    iwm.training.checkpoint.CheckpointError and iwm.config.ConfigError, each one line that names the remedy.
    """
    from iwm.trained import load_trained  # torch takes seconds to import, and not all of iwm needs it

    return load_trained(path, device, encoder)

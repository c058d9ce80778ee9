"""Image World Models: training (train.py), evaluation (evaluate.py), inference (`iwm.load`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from iwm.export.model import PretrainedModel

__all__ = ["__version__", "load"]

__version__ = "0.2.0"


def load(
    path: Path | str,
    device: torch.device | str = "cpu",
    encoder: Literal["teacher", "student"] | None = None,
    resize: bool = True,
) -> PretrainedModel:
    """Load a run's newest checkpoint, one checkpoint file, or a folder that `iwm export` wrote.

        model = iwm.load("runs/demo")
        model(["cat.jpg", "dog.png"])                                # [2, d], a vector for each image
        model.predict("cat.jpg", model.action(brightness=+0.2))      # [1, n, d], features after a change

    encoder: `teacher` (EMA target encoder) or `student` (context encoder). Default: the teacher; for an exported folder
    the encoder that it contains. resize: resize and crop images of any size to the run's, as in evaluation; False
    refuses other sizes. Raises iwm.training.checkpoint.CheckpointError and iwm.config.ConfigError, with one
    line that names the remedy.
    """
    from iwm.export.loading import load_model  # importing torch takes seconds, and parts of iwm do not need it

    return load_model(path, device, encoder, resize)

"""Loggers: where the metrics of a run go. A logger is a class with `log` and `close`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from iwm.config import Config
from iwm.training.wandb_logger import open_wandb
from shards.atomic import write_atomically

METRICS = "metrics.jsonl"


class Logger(Protocol):
    """Destination of a run's metrics, on the main process only."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Store the values of a step; they may be non-finite. Steps do not decrease; one may come more than once."""

    def close(self, failed: bool) -> None:
        """Store what is pending and release files and connections. failed: the run ends by an exception."""


class JsonLinesLogger:
    """Logger that appends a line to metrics.jsonl for each measurement, and flushes it; non-finite values are null."""

    def __init__(self, run: Path, start: int) -> None:
        """Drop the lines after step `start`, from which the run resumes, and a line that a kill cut short.

        A run that starts at step 0 drops all lines.
        """
        self._path = run / METRICS
        if self._path.exists():
            lines = [line for line in self._path.read_text().splitlines() if _is_line_up_to(line, start)]
            write_atomically(self._path, "".join(line + "\n" for line in lines if start > 0).encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, **{key: value if math.isfinite(value) else None for key, value in values.items()}}
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def close(self, failed: bool) -> None:
        pass


class TensorBoardLogger:
    """Logger that writes TensorBoard files to the run's folder `tensorboard`."""

    def __init__(self, run: Path, start: int) -> None:
        """Hide what was written after step `start`, from which the run resumes."""
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start > 0 else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


def open_files(run: Path, start: int, *, tensorboard: bool) -> list[Logger]:
    """Return the loggers that write files of the run's folder, which continue after step `start`."""
    loggers: list[Logger] = [JsonLinesLogger(run, start)]
    if tensorboard:
        loggers.append(TensorBoardLogger(run, start))
    return loggers


def open_loggers(config: Config, run: Path, start: int) -> list[Logger]:
    """Return the loggers of a pretraining run, which continue after step `start`. Raises ConfigError as open_wandb."""
    loggers = open_files(run, start, tensorboard=config.log.tensorboard)
    if config.log.wandb_project is not None:
        loggers.append(open_wandb(config, run))
    return loggers


def _is_line_up_to(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except json.JSONDecodeError:
        return False

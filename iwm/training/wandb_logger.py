"""Metrics in Weights & Biases (log.wandb_project): one W&B run for a run's folder, however often it is resumed.

W&B refuses rows whose step decreases, and a run that was killed logs the steps after its last checkpoint again. So rows
have no W&B step of their own: `step` is one of the values, and the x axis of all others. A step that was trained twice
has two rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iwm.config import Config, ConfigError
from iwm.config_io import to_dict
from iwm.train_config import LogConfig
from shards.atomic import write_atomically
from shards.errors import one_line

RUN_ID = "wandb_id"
"""File of the run's folder with the id of its W&B run."""

ENVIRONMENT = {"WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1", "WANDB_FINISH_TIMEOUT": "60"}
"""Settings of W&B (seconds) where the user's environment has none: rows are in W&B's file after a second, so that
kill -9 costs no more, and a run whose connection was lost ends after a minute."""

NO_LOGIN = ("offline", "dryrun", "disabled")
"""Modes of W&B (WANDB_MODE) that send nothing."""


def check_wandb(log: LogConfig) -> None:
    """Raise ConfigError where metrics go to W&B and the package or the login is missing. Uses no network."""
    if log.wandb_project is None:
        if log.wandb_entity is not None:
            raise ConfigError(f"log.wandb_entity {log.wandb_entity}: nothing is sent to W&B; add --log.wandb-project")
        return
    wandb = _import_wandb()
    try:
        logged_in = wandb.setup().settings.mode in NO_LOGIN or wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise ConfigError(f"log.wandb_project {log.wandb_project}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"log.wandb_project: an environment variable WANDB_… is invalid: {error}") from error
    if not logged_in:
        raise ConfigError(
            f"log.wandb_project {log.wandb_project}: not logged in to W&B; run `wandb login`, set WANDB_API_KEY, or "
            "keep the metrics in the run's folder with WANDB_MODE=offline"
        )


class WandbLogger:
    """Logger of an open W&B run. If W&B's process dies, it says so once and ignores the rest."""

    def __init__(self, run: Any) -> None:
        """Store the `wandb.Run`."""
        self._run = run
        run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is not None:
            self._call(lambda: self._run.log({"step": step, **values}))

    def close(self, failed: bool) -> None:
        if self._run is not None:
            self._call(lambda: self._run.finish(exit_code=int(failed)))

    def _call(self, function: Callable[[], object]) -> None:
        try:
            function()
        except (_import_wandb().Error, OSError) as error:
            self._run = None
            print(f"WARNING: W&B stopped ({error}); the run's folder has all metrics, and a resumed run logs again")


def open_wandb(config: Config, run: Path) -> WandbLogger:
    """Open the W&B run of a run's folder: a new one, or the one whose id is stored there.

    Its files are in RUN/wandb. Without a connection it is kept there alone, which one line says. Raises ConfigError
    where W&B refuses the key or the name of project or entity.
    """
    wandb = _import_wandb()
    stored = run / RUN_ID
    options: dict[str, Any] = {
        "project": config.log.wandb_project,
        "entity": config.log.wandb_entity,
        "id": stored.read_text() if stored.exists() else None,
        "name": os.environ.get("WANDB_NAME", run.name),
        "dir": str(run),
        "config": to_dict(config),
        "resume": "allow",
        "allow_val_change": True,
    }
    try:
        opened = wandb.init(**options)
    except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
        raise ConfigError(f"log.wandb_project {config.log.wandb_project}: {error}") from error
    except (wandb.Error, OSError, TimeoutError) as error:
        opened = wandb.init(**options, mode="offline")
        reason = one_line(error)
        print(
            f"WARNING: W&B cannot be reached ({reason}); send the metrics later: wandb sync {Path(opened.dir).parent}"
        )
    write_atomically(stored, opened.id.encode())
    return WandbLogger(opened)


def _import_wandb() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"log.wandb_project: wandb is not installed ({error}); pip install 'iwm[wandb]', or leave the option out"
        ) from error
    return wandb

"""Where a run begins: at step 0, or where its newest checkpoint left it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from iwm.config import Config, ConfigError, differences
from iwm.training.checkpoint import Checkpoint, newest

MAY_CHANGE = (
    "data.shards",
    "data.threads",
    "data.prefetch",
    "data.hw_decoder_load",
    "data.decoder_",
    "data.micro_batch",
    "optim.kernels",
    "train.device",
    "train.threads",
    "train.compile",
    "train.activation_checkpointing",
    "train.parallel",
    "train.cuda_graph",
    "train.priority_stream",
    "train.deterministic",
    "log.",
)
"""Fields, or their beginnings, that a run may change when it goes on: they do not change what is learnt."""


@contextmanager
def locked(run: Path, option: str = "--run-dir") -> Iterator[None]:
    """Hold a folder, for two writers would destroy each other's. ConfigError, which names `option`, if it is held."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{run} is in use by another training process; wait for it or choose another {option}"
            ) from error
        yield


def resume_point(run: Path, config: Config) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, if there is one, and a line for each setting that changes.

    Raises ConfigError where the run was made with settings that this one contradicts, naming each.
    """
    checkpoint = newest(run)
    if checkpoint is None:
        return None, []
    changed = differences(checkpoint.config, config)
    allowed = {key: pair for key, pair in changed.items() if key.startswith(MAY_CHANGE)}
    refused = [f"--{key} {now} (the run has {then})" for key, (then, now) in changed.items() if key not in allowed]
    if refused:
        raise ConfigError(
            f"{run} holds a run with other settings: {', '.join(refused)}; set them back, or choose another --run-dir"
        )
    return checkpoint, [f"{key}: {then} → {now}" for key, (then, now) in allowed.items()]

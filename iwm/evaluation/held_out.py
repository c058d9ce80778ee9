"""Choice of the images that a model is evaluated on: held-out ones, or training images where there are no others.

Images count as held out where their shards are not those that the checkpoint's model was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iwm.config import ConfigError, DataConfig
from iwm.evaluation.settings import EvalData
from shards.cache import local_folder, location_of
from shards.format import MANIFEST, list_splits, load_manifest
from shards.hold_out import VAL

MAKE_HELD_OUT = "make shards with a validation split (iwm shards with --val-fraction 0.05) and train again"
"""Remedy for shards without a validation split."""

HELD_OUT_REMEDY = f"--data.split NAME or --data.shards FOLDER, or {MAKE_HELD_OUT}"


class MissingDataError(ConfigError):
    """Data without what an evaluation needs: labels, a second split, enough images.

    An evaluator that runs alone ends with this error. `world-model` leaves it out and says so.
    """


def naming_command(error: ConfigError, command: str) -> str:
    """Return the message with the evaluation whose options it names."""
    return f"{error} (iwm evaluate {command})"


@dataclass(frozen=True)
class EvalSplit:
    """Split of a shard folder whose images are evaluated."""

    shards: Path
    """Local folder; of a URL, that of its cache."""
    split: str
    held_out: bool = True
    """False where the model was trained on these images."""
    note: str | None = None
    """Explanation where these are not the run's held-out images."""

    def record(self) -> dict[str, Any]:
        """Return the field `data` of a result: shards, split, held_out and, if there is one, the note."""
        fields = {"shards": location_of(self.shards), "split": self.split, "held_out": self.held_out}
        return fields if self.note is None else {**fields, "note": self.note}


def choose_split(given: EvalData, data: DataConfig, checkpoint: Path) -> EvalSplit:
    """Return the split of --data.split, else the run's validation split, else its training split, else the only one.

    given: options of the command. data: configuration of the run. checkpoint: file of its model. Raises ConfigError for
    a split of --data.split that does not exist and where no split can be chosen, ShardError without shards.
    """
    shards = local_folder(given.shards or data.shards, given.cache or data.cache, data.cache_gb)
    splits, place = list_splits(shards), location_of(shards)
    if not splits:
        load_manifest(shards, data.train)  # raises the error that names the missing manifest
    if given.split is not None and given.split not in splits:
        raise ConfigError(f"--data.split {given.split}: {place} has no split '{given.split}'; use one of {splits}")
    wanted = given.split or data.val or VAL
    candidates = (wanted, data.train, *(splits if len(splits) == 1 else ()))
    split = next((name for name in candidates if name in splits), None)
    if split is None:
        raise ConfigError(f"{place} has no split '{wanted}' or '{data.train}'; use --data.split with one of {splits}")
    held_out = not _was_trained_on(shards, split, data, checkpoint)
    if held_out and split == wanted:
        return EvalSplit(shards, split)
    missing = "" if split == wanted else f"{place} has no split '{wanted}': "
    used = f"{missing}evaluated on split '{split}'"
    if held_out:
        return EvalSplit(shards, split, note=used)
    trained = f"{used}, on which the model was trained; for held-out images use {HELD_OUT_REMEDY}"
    return EvalSplit(shards, split, held_out=False, note=trained)


def _was_trained_on(shards: Path, split: str, data: DataConfig, checkpoint: Path) -> bool:
    """Compare the split with that of the checkpoint by the hashes of their tars; without hashes, by their paths."""
    # Mapped, because only the loader's state is needed of a file of up to gigabytes.
    loader = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["loader"]
    trained = {state["shards"] for state in loader["ranks"]} if loader else set()
    if trained:
        return load_manifest(shards, split).fingerprint in trained
    return split == data.train and shards.resolve() == data.folder.resolve()


def require_images(found: int, at_least: int, shards: Path, split: str) -> None:
    """Raise MissingDataError where a split has fewer images than an evaluation needs."""
    if found < at_least:
        raise MissingDataError(
            f"split '{split}' of {location_of(shards)} has {found} image{'s' if found != 1 else ''}, at least "
            f"{at_least} are needed; use --data.split NAME or --data.shards FOLDER with more images"
        )


def require_splits(shards: Path, train: str, held_out: str, train_option: str) -> None:
    """Raise MissingDataError where a shard folder lacks one of two splits. train_option: option for the first."""
    splits, place = list_splits(shards), location_of(shards)
    remedies = {train: f"use another {train_option}", held_out: f"use another --data.split, or {MAKE_HELD_OUT}"}
    for split, remedy in remedies.items():
        if splits and split not in splits:
            raise MissingDataError(f"{place}/{MANIFEST} has no split '{split}'; it has {splits}; {remedy}")

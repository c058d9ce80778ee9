"""Split of held-out images on which a training run is measured."""

from __future__ import annotations

from iwm.config import ConfigError, DataConfig
from shards.format import list_splits


def held_out_split(data: DataConfig) -> str | None:
    """Return the split of held-out images; None where data.val is None, or is the default and not in the shards.

    Raises ConfigError where the shards lack a split other than the default.
    """
    splits = list_splits(data.folder)
    if data.val is None or data.val in splits:
        return data.val
    if data.val == DataConfig.val:
        return None
    raise ConfigError(
        f"--data.val {data.val}: {data.shards} has no split '{data.val}'; choose one of {splits}, or None"
    )


def missing_split_message(data: DataConfig) -> list[str]:
    """Return one line where the default split of held-out images is not in the shards, with the remedy.

    Raises the ConfigError of held_out_split.
    """
    if data.val is None or held_out_split(data) is not None:
        return []
    return [
        f"{data.shards} has no split '{data.val}' of held-out images: MRR, feature_std and RankMe are not measured. "
        "Make the shards with --val-fraction 0.05, or name another split with --data.val"
    ]

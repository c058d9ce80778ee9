"""Splits that a shard folder already has: the same that this run would make, or others, whose classes it takes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.format import MANIFEST, Column, Manifest, list_splits, load_manifest, remove_split
from shards.verify import check_quick
from shards.writer import SplitWorkdir


def find_existing(workspace: SplitWorkdir, settings: dict[str, Any], overwrite: bool) -> Manifest | None:
    """Return the manifest of a split that is finished; None for one that is to be started or resumed.

    Raise ShardError where OUT has the split with other settings or damaged; with `overwrite`, delete it instead.
    """
    out, split = workspace.out, workspace.split
    try:
        if split in list_splits(out):
            manifest = load_manifest(out, split)
            compare_finished(manifest, settings, str(out))
            check_quick(out, manifest)
            workspace.clear()
            return manifest
        begun = workspace.load_settings()
        if begun is not None:
            _compare(begun, settings, f"{out} has an interrupted run for split '{split}'")
        elif workspace.shard_files():
            raise ShardError(f"{workspace.shard_files()[0]} belongs to no manifest")
    except ShardError as error:
        if not overwrite:
            raise refusal(error) from None
        if split in list_splits(out):
            remove_split(out, split)
        for path in workspace.shard_files():
            path.unlink()
        workspace.clear()
    return None


def known_columns(classes_from: Path | None, folders: list[Path], made: Collection[str]) -> list[Column] | None:
    """Return the label columns that `classes_from` and other splits than those `made` now have; None without.

    folders: those with a manifest of OUT. Raise ShardError where the columns are not the same.
    """
    if classes_from and not list_splits(classes_from):
        raise ShardError(f"--classes-from: {classes_from} has no {MANIFEST}; use a folder of finished shards")
    known: list[Column] | None = None
    for folder in [*([classes_from] if classes_from else []), *folders]:
        for split in list_splits(folder):
            if folder != classes_from and split in made:
                continue
            columns = load_manifest(folder, split).columns
            if known is not None and columns != known:
                raise ShardError(
                    f"split '{split}' of {folder} has other classes than {classes_from} (--classes-from); "
                    "omit the option, or use another OUT"
                )
            known = columns
    return known


def refusal(error: ShardError) -> ShardError:
    """Return the error of a folder whose split is not the one to be made, with the remedies."""
    return ShardError(f"{error}; use another OUT, or --overwrite to replace the split")


def compare_finished(manifest: Manifest, settings: dict[str, Any], out: str) -> None:
    """Raise ShardError, which names the difference, where the finished split of `out` has other settings."""
    # Other codec versions give other bytes, but the finished shards stay valid.
    made_with = {**manifest.settings, "software": settings["software"]}
    _compare(made_with, settings, f"{out} has split '{manifest.split}'")


def _compare(old: dict[str, Any], new: dict[str, Any], whose: str) -> None:
    for name in sorted(old.keys() | new.keys(), key=lambda name: name == "contents"):
        if old.get(name) != new.get(name):
            if name == "contents":
                raise ShardError(
                    f"{whose} made from other contents: files or labels of the source have changed since, "
                    "or --labels is another"
                )
            raise ShardError(f"{whose} made with {name} = {old.get(name)}, this run has {new.get(name)}")

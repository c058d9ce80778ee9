"""Records of what remote sources held, so that a finished split is recognised without copying its source again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from shards.atomic import write_atomically
from shards.errors import ShardError
from shards.existing_split import find_existing
from shards.format import Manifest
from shards.remote_folder import RemoteFolder, record_name
from shards.sources.remote_tars import RemoteTar
from shards.upload import discard_local
from shards.urls import exists, join, read_file
from shards.writer import SplitWorkdir


def identify(tars: list[RemoteTar], *choices: object) -> str | None:
    """Return a hash of a source's files, as their servers describe them, and of the choices of what is used of it.

    None where a server tells neither size nor checksum, and for commands.
    """
    if any(tar.size is None and not tar.checksum for tar in tars):
        return None
    return hashlib.sha256(json.dumps([tars, [repr(choice) for choice in choices]]).encode()).hexdigest()


def save_record(folder: Path, split: str, source: str, contents: str) -> None:
    """Write that the part of this source that becomes the split has these contents (see ShardPlan.digest)."""
    write_atomically(folder / record_name(split), json.dumps({"source": source, "contents": contents}).encode())


def find_finished(
    folder: Path,
    remote: RemoteFolder | None,
    source: str | None,
    splits: Collection[str],
    settings_of: Callable[[str], dict[str, Any]],
    overwrite: bool,
    keep_local: bool,
) -> dict[str, Manifest]:
    """Return the manifests of the splits where all of them are finished, from this source; else an empty dictionary.

    settings_of: function from contents to settings. Raise ShardError where OUT has a split of this source with other
    settings, or damaged, and `overwrite` is not set.
    keep_local: keep what a run left in the work folder that ended after its upload.
    """
    manifests: dict[str, Manifest] = {}
    for split in splits:
        record = _load_record(folder, remote, split)
        if source is None or record.get("source") != source:
            return {}
        settings, workspace = settings_of(record["contents"]), SplitWorkdir(folder, split)
        try:
            with workspace.lock():
                found = (
                    remote.existing_split(split, settings, True, False)
                    if remote
                    else find_existing(workspace, settings, False)
                )
                if found and remote and not keep_local:
                    discard_local(workspace, remote)
        except ShardError:
            if not overwrite:
                raise
            return {}
        if found is None:
            return {}
        manifests[split] = found
    return manifests


def _load_record(folder: Path, remote: RemoteFolder | None, split: str) -> dict[str, str]:
    name = record_name(split)
    if remote:
        data = read_file(join(remote.url, name)) if exists(join(remote.url, name)) else b"{}"
    else:
        data = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
    record: dict[str, str] = json.loads(data)
    return record

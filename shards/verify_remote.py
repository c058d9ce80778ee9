"""Verification of a shard folder at a URL: sizes alone, or the whole check of each shard on a copy."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from shards.errors import ShardError
from shards.format import Column, Shard, list_splits, load_manifest
from shards.remote_folder import RemoteFolder, size_problems
from shards.urls import download, join
from shards.verify import CheckReport, check_shard, verify_splits
from shards.writer import shard_file_pattern


def verify_remote(url: str, *, quick: bool, workers: int | None, console: Console) -> list[str]:
    """Check every split of a shard folder at a URL; return the problems, each with file and field.

    Compare names and sizes of all files with the manifest. Without `quick`, also copy every shard to a temporary
    folder, one at a time in each worker, and check it as verify_shards does. Files that the manifest does not list are
    not found on web servers. Raise ShardError where there is no manifest, or it cannot be read.
    """
    with TemporaryDirectory(prefix="iwm-verify-") as name:
        remote = RemoteFolder(url, Path(name))
        remote.fetch()
        problems = _check_sizes(remote, console)
        check = partial(_compared_before if quick else _check_copy, url)
        problems += verify_splits(remote.mirror, check, url, 1 if quick else workers, console)
        return [problem.replace(f"{name}/", f"{url}/") for problem in dict.fromkeys(problems)]


def _check_sizes(remote: RemoteFolder, console: Console) -> list[str]:
    manifests = [load_manifest(remote.mirror, split) for split in list_splits(remote.mirror)]
    listed = {name for manifest in manifests for shard in manifest.shards for name in (shard.name, shard.index)}
    with console.status(f"listing {remote.url}"):
        files = remote.files(sorted(listed))
    problems = []
    for manifest in manifests:
        problems += size_problems(remote.url, manifest, files)
        problems += [
            f"{join(remote.url, name)} is not in the manifest: remove it"
            for name in sorted(filter(shard_file_pattern(manifest.split).fullmatch, files.keys() - listed))
        ]
    return problems


def _compared_before(url: str, columns: list[Column], masks: bool, shard: Shard) -> Generator[CheckReport, None, None]:
    yield CheckReport(shard.samples, [], [])


def _check_copy(url: str, columns: list[Column], masks: bool, shard: Shard) -> Generator[CheckReport, None, None]:
    with TemporaryDirectory(prefix="iwm-verify-") as folder:
        try:
            for name in (shard.name, shard.index):
                download(join(url, name), Path(folder) / name)
        except ShardError as error:
            yield CheckReport(shard.samples, [str(error)], [])
            return
        for report in check_shard(Path(folder), columns, masks, shard, decode=True):
            problems = [problem.replace(f"{folder}/", f"{url.rstrip('/')}/") for problem in report.problems]
            yield report._replace(problems=problems)

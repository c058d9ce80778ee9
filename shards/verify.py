"""Verification of shards against their manifest.

check_quick runs at every training start. verify_shards is the full check of `iwm verify`.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from rich.console import Console

from shards import jpeg
from shards.errors import ShardError
from shards.format import (
    Column,
    Entry,
    Manifest,
    RejectedSample,
    Shard,
    index_lines,
    list_splits,
    load_manifest,
    load_rejections,
    parse_index,
    parse_sample,
)
from shards.listing import list_members
from shards.workers import ProgressCount, available_cores, run_tasks, show_progress
from shards.writer import SplitWorkdir

REMEDY = "copy it again, or remake the split with iwm shards"


def check_quick(folder: Path, manifest: Manifest) -> None:
    """Raise ShardError at the first shard that is missing, has another size, or does not match its index.

    Read each index and two headers of each tar: about 0.2 ms per shard, for every training start. Only
    `iwm verify` finds damage inside a tar that does not change its size.
    """
    for shard in manifest.shards:
        tar, index = folder / shard.name, folder / shard.index
        _check_size(tar, shard.bytes)
        _check_size(index, shard.index_bytes)
        content = index.read_bytes()
        if hashlib.sha256(content).hexdigest() != shard.index_sha256:
            raise ShardError(f"{index} is not the index that belongs to {shard.name} (index_sha256): {REMEDY}")
        lines = index_lines(content, index)
        if len(lines) != shard.samples or not lines:
            raise ShardError(f"{index} lists {len(lines)} samples, expected {shard.samples}: {REMEDY}")
        _check_ends(tar, [parse_sample(line, index)[0] for line in (lines[0], lines[-1])])


def _check_ends(tar: Path, entries: list[Entry]) -> None:
    """Raise ShardError where the tar has other members at these offsets, as another tar of the same size does."""
    with open(tar, "rb") as file:
        for entry in entries:
            header = os.pread(file.fileno(), tarfile.BLOCKSIZE, entry.offset - tarfile.BLOCKSIZE)
            if header[:100].rstrip(b"\0") != entry.name.encode():
                raise ShardError(f"{tar} has no member {entry.name} where its index points: {REMEDY}")


class CheckReport(NamedTuple):
    """Progress report of a check: samples checked since the last report, problems found, keys of the shard."""

    samples: int
    problems: list[str]
    keys: list[str]


def verify_shards(folder: Path, *, decode: bool, workers: int | None, console: Console) -> list[str]:
    """Check every split of a shard folder against its manifest; return the problems, each with file and field.

    Check hashes and sizes of all files, index against tar, counts, labels within their classes, unique keys per split,
    unlisted files, read = written + rejected, and with `decode` all pixels of every image. Raise ShardError where there
    is no manifest.
    """
    return verify_splits(folder, partial(check_shard, folder, decode=decode), str(folder), workers, console)


ShardCheck = Callable[[list[Column], bool, Shard], Generator[CheckReport, None, None]]
"""Check of a shard whose split has these label columns, and masks or not."""


def verify_splits(folder: Path, check: ShardCheck, place: str, workers: int | None, console: Console) -> list[str]:
    """Check the splits of the manifest in `folder`, and every shard by `check`; return the problems.

    place: where the shards are, for messages. Raise ShardError where there is no manifest.
    """
    splits = [load_manifest(folder, split) for split in list_splits(folder)]
    if not splits:
        raise ShardError(f"{place} has no manifest.json: correct the folder, or finish a split (iwm shards)")
    problems = [
        f"manifest.json: split '{manifest.split}' has other classes than '{splits[0].split}': remake one of them"
        for manifest in splits
        if {column.name: column for column in manifest.columns} != {column.name: column for column in splits[0].columns}
    ]
    for manifest in splits:
        seen: set[str] = set()
        before = len(problems)
        problems += _check_totals(folder, manifest)
        reports = run_tasks(
            partial(check, manifest.columns, manifest.masks),
            manifest.shards,
            min(workers or available_cores(), max(len(manifest.shards), 1)),
            name=lambda shard: shard.name,
        )
        with closing(reports):
            show_progress(_collect(reports, manifest.split, seen, problems), manifest.samples, console, bad="problems")
        found = len(problems) - before
        console.print(
            f"{manifest.split}: {len(manifest.shards)} shards, {manifest.samples:,} samples, "
            f"{manifest.bytes / 1e6:,.1f} MB, {found or 'no'} problem{'s' * (found != 1)}"
        )
    return problems


def _collect(
    reports: Iterable[CheckReport], split: str, seen: set[str], problems: list[str]
) -> Iterator[ProgressCount]:
    for report in reports:
        duplicates: list[str] = []
        for key in report.keys:
            if key in seen:
                duplicates.append(key)
            seen.add(key)
        found = report.problems + [f"{split}: key '{key}' occurs twice; remake the split" for key in duplicates]
        problems += found
        yield ProgressCount(report.samples, len(found))


def _check_totals(folder: Path, manifest: Manifest) -> list[str]:
    """Check the totals in the manifest and look for unlisted files; return the problems."""
    split = f"manifest.json, split '{manifest.split}'"
    problems: list[str] = []
    sums = {"samples": sum(s.samples for s in manifest.shards), "bytes": sum(s.bytes for s in manifest.shards)}
    sums["read"] = manifest.samples + manifest.rejected
    try:
        sums["rejected"] = len(load_rejections(folder, manifest.split))
    except ShardError as error:
        problems.append(str(error))
    for name, total in sums.items():
        if getattr(manifest, name) != total:
            problems.append(f"{split}: {name} is {getattr(manifest, name):,}, but the sum is {total:,}")
    listed = {name for shard in manifest.shards for name in (shard.name, shard.index)}
    workspace = SplitWorkdir(folder, manifest.split)
    problems += [
        f"{path} is not in the manifest: remove it" for path in workspace.shard_files() if path.name not in listed
    ]
    return problems


def check_shard(
    folder: Path, columns: list[Column], masks: bool, shard: Shard, *, decode: bool
) -> Generator[CheckReport, None, None]:
    """Check one shard, in a worker process; yield progress with the problems found."""
    tar, index = folder / shard.name, folder / shard.index
    try:
        _check_size(tar, shard.bytes)
        _check_size(index, shard.index_bytes)
        content = index.read_bytes()
        samples = parse_index(content, index)
        with open(tar, "rb") as file:
            tar_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        problems = [
            f"{path}: {field} is {found[:12]}…, expected {expected[:12]}…: {REMEDY}"
            for path, field, found, expected in (
                (tar, "sha256", tar_sha256, shard.sha256),
                (index, "index_sha256", hashlib.sha256(content).hexdigest(), shard.index_sha256),
            )
            if found != expected
        ]
        if len(samples) != shard.samples:
            problems.append(f"{index} lists {len(samples):,} samples, expected {shard.samples:,}: {REMEDY}")
        entries = [(entry.name, entry.offset, entry.size) for sample in samples for entry in sample]
        if entries != list(list_members(tar)):
            problems.append(f"{index} does not describe the members of {tar}: {REMEDY}")
            yield CheckReport(shard.samples, problems, [])
            return
    except (ShardError, OSError) as error:
        yield CheckReport(shard.samples, [str(error)], [])
        return
    yield CheckReport(0, problems, [sample[0].key for sample in samples])
    expected = ["jpg", *(column.component for column in columns), *(["mask.png"] if masks else [])]
    found: list[str] = []
    with open(tar, "rb") as file:
        for number, sample in enumerate(samples, start=1):
            for problem in _check_sample(file.fileno(), sample, expected, columns, decode):
                found.append(f"{tar}, sample {sample[0].key}: {problem}")
            if number % 100 == 0 or number == len(samples):
                yield CheckReport((number - 1) % 100 + 1, found, [])
                found = []


def _check_sample(
    tar: int, sample: list[Entry], expected: list[str], columns: list[Column], decode: bool
) -> Iterator[str]:
    if [entry.component for entry in sample] != expected:
        yield f"its components are {[entry.component for entry in sample]}, must be {expected}"
        return
    if len({entry.key for entry in sample}) > 1:
        yield "its components have several keys"
    content = {entry.component: os.pread(tar, entry.size, entry.offset) for entry in sample}
    for column in columns:
        label = content[column.component].decode("ascii", "replace")
        if not label.isdecimal() or int(label) >= len(column.classes):
            yield f"label {label!r} ({column.component}) is not an index into {len(column.classes)} classes"
    if decode:
        try:
            if not jpeg.read_header(content["jpg"]).is_baseline_ycbcr:
                yield "its jpg is not a baseline, upright, YCbCr JPEG"
            height, width, _ = jpeg.decode(content["jpg"]).shape
        except RejectedSample as reason:
            yield f"its jpg: {reason}"
            return
        if "mask.png" in content:
            yield from _check_mask(content["mask.png"], (width, height))


def _check_mask(png: bytes, size: tuple[int, int]) -> Iterator[str]:
    try:
        mask = Image.open(io.BytesIO(png))
        mask.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        yield f"its mask.png cannot be decoded: {error}"
        return
    if mask.format != "PNG" or mask.mode != "L" or mask.size != size:
        yield f"its mask.png is {mask.format} {mask.mode} {mask.size}, must be PNG L {size}"


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path} is missing, but the manifest lists it: {REMEDY}") from None
    if size != expected:
        raise ShardError(f"{path} has {size:,} bytes, expected {expected:,}: {REMEDY}")

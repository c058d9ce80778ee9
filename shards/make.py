"""Making of one split of a shard folder: list, plan, write in workers, write the manifest."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import PIL
import simplejpeg
from rich.console import Console
from tyro.conf import Positional, arg

from shards.errors import ShardError
from shards.format import (
    MANIFEST,
    REJECTED,
    Column,
    Manifest,
    list_splits,
    load_manifest,
    remove_split,
    save_manifest,
    save_rejections,
)
from shards.images import CONVERTED, RESIZED, ImageOptions
from shards.plan import ShardPlan, ShardSize, Subset, plan_shards, read_subset
from shards.sources.detect import SourceKind, SourceOptions, detect, list_source
from shards.verify import check_quick
from shards.workers import available_cores, run_tasks, show_progress
from shards.writer import ShardJob, ShardTask, SplitWorkdir, explain_write_errors, write_shard

MAX_PIXELS = 178_956_970
"""Largest image that Pillow opens (pixels)."""


@dataclass(frozen=True)
class ShardingOptions:
    """Make one split of a shard folder. After an interruption, rerun the same command to resume.

    A second form checks a finished folder: make_shards.py verify OUT
    """

    src: Positional[Annotated[str, arg(metavar="SRC")]]
    """Images: a folder with one folder per class, an ImageNet tar, or a folder of images with --masks.
    Lists: a CSV file (columns path, label, further labels, mask), a .txt file, or COCO annotations in a .json file.
    WebDataset tars: their folder, a brace pattern or a glob."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """The shard folder, created where it does not exist. It can hold several splits."""
    split: str
    """Name of the split, for example train or val. The shards are named SPLIT-000000.tar and so on."""
    source: Literal["auto"] | SourceKind = "auto"
    """Kind of the source. With auto, it is detected from SRC."""
    seed: int = 0
    """Seed of the shuffle over all samples of the split."""
    workers: int | None = None
    """Number of worker processes; None for one per core. The result does not depend on it."""
    image: ImageOptions = field(default_factory=ImageOptions)
    shard: ShardSize = field(default_factory=ShardSize)
    extra: SourceOptions = field(default_factory=SourceOptions)
    subset: Path | None = None
    """Text file with one image name per line: only these images are used. Each must exist in the source."""
    classes_from: Path | None = None
    """Another shard folder whose classes are used, so that a label has the same meaning in both.
    Splits of one folder always share their classes."""
    overwrite: bool = False
    """If OUT holds this split with other settings, or damaged, delete the split and make it again."""


def make_shards(options: ShardingOptions, console: Console) -> Manifest:
    """Make one split, or resume an interrupted run with the same settings; return the manifest.

    Raise ShardError, with the remedy, for invalid options, unusable sources, and read or write errors. Files get their
    final names only when they are complete, so a run can resume after any interruption.
    """
    _check_options(options)
    workspace = SplitWorkdir(options.out, options.split)
    with console.status(f"listing {options.src}"), _explain_read_errors(options.src):
        kind = detect(options.src, options.extra) if options.source == "auto" else options.source
        listing = list_source(options.src, kind, options.extra)
        subset = read_subset(options.subset) if options.subset else None
        if subset:
            listing = subset.of(listing, options.src)
        plan = plan_shards(listing, _known_columns(options), options.seed, options.image.resize, options.shard)
    settings = _settings(options, kind, subset, plan)
    console.print(
        f"{options.split}: {plan.read:,} {'of the subset ' if subset else ''}found in {options.src} ({kind}), "
        f"{len(plan.rejections):,} of them rejected "
        f"without reading them, {plan.hidden:,} hidden files ignored; {plan.shards} shards to make"
    )
    with workspace.lock():
        existing = _existing_split(workspace, settings, options.overwrite)
        if existing:
            console.print(f"{options.out} already has this split with the same settings: nothing to do")
            return existing
        return _make(options, workspace, plan, settings, console)


def _make(
    options: ShardingOptions, workspace: SplitWorkdir, plan: ShardPlan, settings: dict[str, Any], console: Console
) -> Manifest:
    with explain_write_errors(options.out):
        workspace.remove_partials()
        workspace.save_settings(settings)
    todo = [number for number in range(plan.shards) if workspace.load_record(number) is None]
    if len(todo) < plan.shards:
        console.print(f"resuming: {plan.shards - len(todo)} of {plan.shards} shards are finished")
    _warn_of_small_disk(options.out, plan.estimated_bytes * len(todo) // plan.shards, console)
    reports = run_tasks(
        partial(write_shard, ShardJob(workspace, plan.columns, options.image)),
        (ShardTask(number, plan.shard(number)) for number in todo),
        workers=min(options.workers or available_cores(), max(len(todo), 1)),
        name=lambda task: f"shard {workspace.shard_name(task.number)}",
    )
    try:
        with closing(reports):
            show_progress(reports, sum(len(plan.shard(number)) for number in todo), console)
    finally:
        workspace.remove_partials()
    with explain_write_errors(options.out):
        manifest = _finish(options, workspace, plan, settings)
    console.print(
        f"{options.split}: read {manifest.read:,} = written {manifest.samples:,} + rejected {manifest.rejected:,}"
        f"{f' (see {options.out / REJECTED})' if manifest.rejected else ''}; "
        f"{len(manifest.shards)} shards, {manifest.bytes / 1e6:,.1f} MB in {options.out}"
    )
    return manifest


def _finish(options: ShardingOptions, workspace: SplitWorkdir, plan: ShardPlan, settings: dict[str, Any]) -> Manifest:
    """Write rejections and manifest from the records. The manifest comes last: a split that it names is complete."""
    records = [workspace.load_record(number) for number in range(plan.shards)]
    whole = [record for record in records if record]
    shards = [record.shard for record in whole if record.shard]
    rejections = plan.rejections + [rejection for record in whole for rejection in record.rejections]
    samples = sum(shard.samples for shard in shards)
    if len(whole) < plan.shards or samples + len(rejections) != plan.read:
        raise ShardError(
            f"read {plan.read:,} is not written {samples:,} + rejected {len(rejections):,}: another process changed "
            f"files of {options.out}; rerun the same command"
        )
    if not shards:
        workspace.clear()
        first = rejections[0]
        raise ShardError(f"all {plan.read:,} samples were rejected, the first ({first.path}) because: {first.reason}")
    save_rejections(options.out, options.split, rejections)
    manifest = Manifest(
        split=options.split,
        seed=options.seed,
        samples=samples,
        bytes=sum(shard.bytes for shard in shards),
        read=plan.read,
        rejected=len(rejections),
        columns=plan.columns,
        masks=plan.masks,
        settings=settings,
        shards=shards,
    )
    save_manifest(options.out, manifest)
    workspace.clear()
    return manifest


def _check_options(options: ShardingOptions) -> None:
    rules, cut = options.image, options.shard
    limits = {
        "--split": (bool(re.fullmatch(r"[A-Za-z0-9_-]+", options.split)), "letters, digits, '_' and '-' only"),
        "--workers": (options.workers is None or options.workers >= 1, "at least 1"),
        "--seed": (options.seed >= 0, "at least 0"),
        "--resize": (rules.resize is None or rules.resize >= rules.min_side, "at least --min-side"),
        "--min-side": (rules.min_side >= 1, "at least 1"),
        "--max-pixels": (1 <= rules.max_pixels <= MAX_PIXELS, f"from 1 to {MAX_PIXELS:,}"),
        "--shard-mb": (cut.shard_mb > 0, "above 0"),
        "--min-shards": (cut.min_shards >= 1, "at least 1"),
    }
    for option, (valid, requirement) in limits.items():
        if not valid:
            raise ShardError(f"{option} must be {requirement}")
    for name, folder in (("SRC", Path(options.src)), ("--masks", options.extra.masks)):
        if folder and folder.is_dir() and options.out.resolve().is_relative_to(folder.resolve()):
            raise ShardError(f"OUT ({options.out}) is inside {name} ({folder}): use a folder outside the source")


def _known_columns(options: ShardingOptions) -> list[Column] | None:
    """Return the label columns that the split must share with `classes_from` and OUT's other splits, or None."""
    if options.classes_from and not list_splits(options.classes_from):
        raise ShardError(f"--classes-from: {options.classes_from} has no {MANIFEST}; use a folder of finished shards")
    known: list[Column] | None = None
    for folder in filter(None, (options.classes_from, options.out)):
        for split in list_splits(folder):
            if folder == options.out and split == options.split:
                continue
            columns = load_manifest(folder, split).columns
            if known is not None and columns != known:
                raise ShardError(
                    f"split '{split}' of {folder} has other classes than {options.classes_from} (--classes-from); "
                    "omit the option, or use another OUT"
                )
            known = columns
    return known


def _settings(options: ShardingOptions, kind: str, subset: Subset | None, plan: ShardPlan) -> dict[str, Any]:
    """Return everything that the shards' bytes depend on."""
    return {
        "source": kind,
        "subset": subset.description if subset else None,
        "contents": plan.digest,
        "seed": options.seed,
        **asdict(options.image),
        **asdict(options.shard),
        "encoding": {"resized": RESIZED, "converted": CONVERTED},
        "software": {"pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__, "numpy": np.__version__},
    }


def _existing_split(workspace: SplitWorkdir, settings: dict[str, Any], overwrite: bool) -> Manifest | None:
    """Return the manifest of a split that is finished; None for one that is to be started or resumed.

    Raise ShardError where OUT has the split with other settings or damaged; with `overwrite`, delete it instead.
    """
    out, split = workspace.out, workspace.split
    try:
        if split in list_splits(out):
            manifest = load_manifest(out, split)
            # Other codec versions give other bytes, but the finished shards stay valid.
            made_with = {**manifest.settings, "software": settings["software"]}
            _compare(made_with, settings, f"{out} has split '{split}'")
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
            raise ShardError(f"{error}; use another OUT, or --overwrite to replace the split") from None
        if split in list_splits(out):
            remove_split(out, split)
        for path in workspace.shard_files():
            path.unlink()
        workspace.clear()
    return None


def _compare(old: dict[str, Any], new: dict[str, Any], whose: str) -> None:
    for name in sorted(old.keys() | new.keys(), key=lambda name: name == "contents"):
        if old.get(name) != new.get(name):
            if name == "contents":
                raise ShardError(f"{whose} made from other contents: files or labels of the source have changed since")
            raise ShardError(f"{whose} made with {name} = {old.get(name)}, this run has {new.get(name)}")


def _warn_of_small_disk(out: Path, needed: int, console: Console) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        console.print(
            f"about {needed / 1e9:.1f} GB to write, only {free / 1e9:.1f} GB free on the disk of {out}", style="yellow"
        )


@contextmanager
def _explain_read_errors(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path = error.filename or source
        raise ShardError(f"cannot read {path}: {error.strerror}; correct the path or the permissions") from error

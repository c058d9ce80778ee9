"""Making of the splits of a shard folder: list, plan, write in workers, write the manifest."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
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
from shards.few_images import few_images_advice
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
from shards.hold_out import TRAIN, VAL, hold_out
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
    """Make the shards of a split, or of two. After an interruption, rerun the same command to resume.

    A second command checks a finished folder: iwm verify OUT, or make_shards.py verify OUT.
    """

    src: Positional[Annotated[str, arg(metavar="SRC")]]
    """Images: a folder of images at any depth, with one folder per class or not, or an ImageNet tar.
    Lists: a .txt file of paths, a CSV file (columns path, label, further labels, mask; all but path may be missing).
    COCO annotations in a .json file.
    WebDataset tars: their folder, a brace pattern or a glob."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """The shard folder, created where it does not exist. It can hold several splits."""
    split: str = TRAIN
    """Name of the split, for example train or val. The shards are named SPLIT-000000.tar and so on."""
    val_fraction: float | None = None
    """Make the splits train and val of SRC; this fraction of the images (above 0, below 1) is held out for val.
    A hash of the image's key alone decides. None: one split."""
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
    """If OUT holds a split to be made with other settings, or damaged, delete the split and make it again."""


def make_shards(options: ShardingOptions, console: Console) -> dict[str, Manifest]:
    """Make one split, or train and val, or resume an interrupted run with the same settings; return manifests by split.

    Raise ShardError, with the remedy, for invalid options, unusable sources, and read or write errors. Files get their
    final names only when they are complete, so a run can resume after any interruption.
    """
    _check_options(options)
    with console.status(f"listing {options.src}"), _explain_read_errors(options.src):
        kind = detect(options.src, options.extra) if options.source == "auto" else options.source
        listing = list_source(options.src, kind, options.extra)
        subset = read_subset(options.subset) if options.subset else None
        if subset:
            listing = subset.of(listing, options.src)
        fraction = options.val_fraction if listing.samples else None
        parts = {options.split: listing} if fraction is None else hold_out(listing, fraction)
        known = _known_columns(options, parts)
        plans = {
            split: plan_shards(part, known, options.seed, options.image.resize, options.shard)
            for split, part in parts.items()
        }
    console.print(listing.labelling)
    with ExitStack() as locks:
        runs = []
        for split, plan in plans.items():
            console.print(
                f"{split}: {plan.read:,} {'of the subset ' if subset else ''}found in {options.src} ({kind}), "
                f"{len(plan.rejections):,} of them rejected "
                f"without reading them, {plan.hidden:,} hidden files ignored; {plan.shards} shards to make"
            )
            workspace, settings = SplitWorkdir(options.out, split), _settings(options, kind, subset, plan)
            locks.enter_context(workspace.lock())
            runs.append((workspace, plan, settings, _existing_split(workspace, settings, options.overwrite)))
        manifests = {}
        for workspace, plan, settings, existing in runs:
            if existing:
                console.print(
                    f"{options.out} already has the split '{workspace.split}' with the same settings: nothing to do"
                )
            manifests[workspace.split] = existing or _make(options, workspace, plan, settings, console)
    if TRAIN in manifests:
        for line in few_images_advice(manifests[TRAIN].samples):
            console.print(line)
    return manifests


def _make(
    options: ShardingOptions, workspace: SplitWorkdir, plan: ShardPlan, settings: dict[str, Any], console: Console
) -> Manifest:
    with explain_write_errors(options.out):
        workspace.remove_partials()
        workspace.save_settings(settings)
    todo = [number for number in range(plan.shards) if workspace.load_record(number) is None]
    if len(todo) < plan.shards:
        console.print(f"{workspace.split}: resuming: {plan.shards - len(todo)} of {plan.shards} shards are finished")
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
        manifest = _finish(options.seed, workspace, plan, settings)
    console.print(
        f"{workspace.split}: read {manifest.read:,} = written {manifest.samples:,} + rejected {manifest.rejected:,}"
        f"{f' (see {options.out / REJECTED})' if manifest.rejected else ''}; "
        f"{len(manifest.shards)} shards, {manifest.bytes / 1e6:,.1f} MB in {options.out}"
    )
    return manifest


def _finish(seed: int, workspace: SplitWorkdir, plan: ShardPlan, settings: dict[str, Any]) -> Manifest:
    """Write rejections and manifest from the records. The manifest comes last: a split that it names is complete."""
    records = [workspace.load_record(number) for number in range(plan.shards)]
    whole = [record for record in records if record]
    shards = [record.shard for record in whole if record.shard]
    rejections = plan.rejections + [rejection for record in whole for rejection in record.rejections]
    samples = sum(shard.samples for shard in shards)
    if len(whole) < plan.shards or samples + len(rejections) != plan.read:
        raise ShardError(
            f"read {plan.read:,} is not written {samples:,} + rejected {len(rejections):,}: another process changed "
            f"files of {workspace.out}; rerun the same command"
        )
    if not shards:
        workspace.clear()
        first = rejections[0]
        remedy = "correct the source" if settings["val_fraction"] is None else "use another --val-fraction"
        raise ShardError(
            f"{workspace.split}: all {plan.read:,} samples were rejected, the first ({first.path}) because: "
            f"{first.reason}; {remedy}"
        )
    save_rejections(workspace.out, workspace.split, rejections)
    manifest = Manifest(
        split=workspace.split,
        seed=seed,
        samples=samples,
        bytes=sum(shard.bytes for shard in shards),
        read=plan.read,
        rejected=len(rejections),
        columns=plan.columns,
        masks=plan.masks,
        settings=settings,
        shards=shards,
    )
    save_manifest(workspace.out, manifest)
    workspace.clear()
    return manifest


def _check_options(options: ShardingOptions) -> None:
    rules, cut = options.image, options.shard
    limits = {
        "--split": (bool(re.fullmatch(r"[A-Za-z0-9_-]+", options.split)), "letters, digits, '_' and '-' only"),
        "--val-fraction": (options.val_fraction is None or 0 < options.val_fraction < 1, "above 0 and below 1"),
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
    if options.val_fraction is not None and options.split != TRAIN:
        raise ShardError(f"--val-fraction makes the splits '{TRAIN}' and '{VAL}': omit --split {options.split}")
    for name, folder in (("SRC", Path(options.src)), ("--masks", options.extra.masks)):
        if folder and folder.is_dir() and options.out.resolve().is_relative_to(folder.resolve()):
            raise ShardError(f"OUT ({options.out}) is inside {name} ({folder}): use a folder outside the source")


def _known_columns(options: ShardingOptions, made: Collection[str]) -> list[Column] | None:
    """Return the label columns that `classes_from` and OUT's other splits than those `made` now have; None without."""
    if options.classes_from and not list_splits(options.classes_from):
        raise ShardError(f"--classes-from: {options.classes_from} has no {MANIFEST}; use a folder of finished shards")
    known: list[Column] | None = None
    for folder in filter(None, (options.classes_from, options.out)):
        for split in list_splits(folder):
            if folder == options.out and split in made:
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
        "val_fraction": options.val_fraction,
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
                raise ShardError(
                    f"{whose} made from other contents: files or labels of the source have changed since, "
                    "or --labels is another"
                )
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

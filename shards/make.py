"""Making of the splits of a shard folder: list, plan, write in workers, write the manifest."""

from __future__ import annotations

import re
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from shards.distributors import Distributor, DistributorName, open_distributor
from shards.errors import ShardError
from shards.existing_split import find_existing, known_columns
from shards.few_images import few_images_advice
from shards.format import (
    REJECTED,
    Manifest,
    save_manifest,
    save_rejections,
)
from shards.hold_out import TRAIN, VAL, hold_out
from shards.images import CONVERTED, RESIZED, ImageOptions, codec_versions
from shards.plan import ShardPlan, ShardSize, plan_shards, read_subset
from shards.remote_folder import RemoteFolder
from shards.remote_options import MIRROR, RemoteOptions, check_remote_options
from shards.source_record import find_finished, identify, save_record
from shards.sources.detect import SourceKind, SourceOptions, detect, explain_read_errors, list_source
from shards.sources.remote_tars import find_tars, is_remote
from shards.sources.staged_tars import StagingFolder
from shards.upload import SplitUpload, default_work_dir, discard_local, remove_unused
from shards.urls import is_url
from shards.workers import show_progress
from shards.writer import ShardJob, ShardTask, SplitWorkdir, explain_write_errors, warn_of_small_disk, write_shard

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
    WebDataset tars: their folder, a brace pattern or a glob, on a disk or at URLs (s3://, gs://, hf://, https://).
    Commands that print tars: pipe:COMMAND, also with a brace pattern."""
    out: Positional[Annotated[str | Path, arg(metavar="OUT", constructor=str)]]
    """The shard folder, created where it does not exist. It can hold several splits.
    At a URL (s3://, gs://) the shards are made in a work folder and uploaded."""
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
    """Number of worker processes; None for one per core. The result does not depend on it.
    With Ray: the most shards that are made at a time; None for as many as the cluster has CPUs."""
    distributor: DistributorName = "processes"
    """Where the workers are. processes: on this machine. The result does not depend on it.
    ray: on the Ray cluster of RAY_ADDRESS, else on the one that `ray start` has started here, else on a new one here.
    All of its nodes must see SRC and OUT under the same paths."""
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
    remote: RemoteOptions = field(default_factory=RemoteOptions)

    @property
    def folder(self) -> Path:
        """The shard folder on a disk."""
        return Path(self.out)


def make_shards(options: ShardingOptions, console: Console) -> dict[str, Manifest]:
    """Make one split, or train and val, or resume an interrupted run with the same settings; return manifests by split.

    Raise ShardError, with the remedy, for invalid options, unusable sources, and read or write errors. Files get their
    final names only when they are complete, so a run can resume after any interruption.
    """
    _check_options(options)
    distributor = open_distributor(options.distributor, options.workers, console)
    url = str(options.out)
    if not is_url(url):
        return _make_from_source(options, None, distributor, console)
    work = options.remote.work_dir or default_work_dir(url)
    remote = RemoteFolder(url, work / MIRROR)
    try:
        remote.fetch()
        return _make_from_source(replace(options, out=work), remote, distributor, console)
    finally:
        remove_unused(work, remote)


def _make_from_source(
    options: ShardingOptions, remote: RemoteFolder | None, distributor: Distributor, console: Console
) -> dict[str, Manifest]:
    """Make the splits in a local folder, from a source on a disk or from staged copies of its tars."""
    if not is_remote(options.src):
        return _make_splits(options, None, remote, distributor, console)
    with console.status(f"listing {options.src}"):
        tars = find_tars(options.src)
    subset = read_subset(options.subset).description if options.subset else None
    source = identify(tars, options.split, options.val_fraction, subset, options.extra, options.classes_from)
    finished = find_finished(
        options.folder,
        remote,
        source,
        [options.split] if options.val_fraction is None else [VAL, TRAIN],
        lambda contents: _settings(options, "webdataset", subset, contents),
        options.overwrite,
        options.remote.keep_local,
    )
    staging = StagingFolder((options.remote.staging or options.folder) / f".{options.split}.source")
    with staging.lock():
        if finished:
            console.print(f"{remote.url if remote else options.folder} has {' and '.join(finished)}: nothing to do")
            staging.remove()
            return finished
        manifests = _make_splits(options, staging.stage(tars, console), remote, distributor, console, source)
        staging.remove()
    return manifests


def _make_splits(
    options: ShardingOptions,
    staged: list[Path] | None,
    remote: RemoteFolder | None,
    distributor: Distributor,
    console: Console,
    source: str | None = None,
) -> dict[str, Manifest]:
    with console.status(f"listing {options.src}"), explain_read_errors(options.src):
        kind = detect(options.src, options.extra) if options.source == "auto" else options.source
        listing = list_source(options.src, kind, options.extra, staged)
        subset = read_subset(options.subset) if options.subset else None
        if subset:
            listing = subset.of(listing, options.src)
        fraction = options.val_fraction if listing.samples else None
        parts = {options.split: listing} if fraction is None else hold_out(listing, fraction)
        known = known_columns(options.classes_from, [options.folder, *([remote.mirror] if remote else [])], parts)
        plans = {
            split: plan_shards(part, known, options.seed, options.image.resize, options.shard)
            for split, part in parts.items()
        }
    console.print(listing.labelling)
    with ExitStack() as locks:
        locks.enter_context(closing(distributor))
        runs = []
        for split, plan in plans.items():
            console.print(
                f"{split}: {plan.read:,} {'of the subset ' if subset else ''}found in {options.src} ({kind}), "
                f"{len(plan.rejections):,} of them rejected "
                f"without reading them, {plan.hidden:,} hidden files ignored; {plan.shards} shards to make"
            )
            workspace = SplitWorkdir(options.folder, split)
            settings = _settings(options, kind, subset.description if subset else None, plan.digest)
            locks.enter_context(workspace.lock())
            upload = locks.enter_context(SplitUpload(workspace, remote)) if remote else None
            whole = upload.existing_split(settings, options.overwrite) if upload else None
            existing = whole or find_existing(workspace, settings, options.overwrite)
            if source:
                save_record(remote.mirror if remote else options.folder, split, source, plan.digest)
            runs.append((workspace, plan, settings, existing, upload if not whole else None))
        manifests = {}
        for workspace, plan, settings, existing, upload in runs:
            if existing:
                console.print(
                    f"{remote.url if remote and not upload else options.folder} already has the split "
                    f"'{workspace.split}' with the same settings: nothing to {'make' if upload else 'do'}"
                )
            manifest = existing or _make(options, workspace, plan, settings, upload, distributor, console)
            if upload:
                upload.finish(manifest, console)
            if remote and not options.remote.keep_local:
                discard_local(workspace, remote)
            manifests[workspace.split] = manifest
    if TRAIN in manifests:
        for line in few_images_advice(manifests[TRAIN].samples):
            console.print(line)
    return manifests


def _make(
    options: ShardingOptions,
    workspace: SplitWorkdir,
    plan: ShardPlan,
    settings: dict[str, Any],
    upload: SplitUpload | None,
    distributor: Distributor,
    console: Console,
) -> Manifest:
    with explain_write_errors(workspace.out):
        workspace.remove_partials()
        workspace.save_settings(settings)
    todo = [number for number in range(plan.shards) if workspace.load_record(number) is None]
    if len(todo) < plan.shards:
        console.print(f"{workspace.split}: resuming: {plan.shards - len(todo)} of {plan.shards} shards are finished")
    warn_of_small_disk(workspace.out, plan.estimated_bytes * len(todo) // plan.shards, console)
    reports = distributor.run(
        partial(write_shard, ShardJob(workspace, plan.columns, options.image)),
        (ShardTask(number, plan.shard(number)) for number in todo),
        count=len(todo),
        name=lambda task: f"shard {workspace.shard_name(task.number)}",
        folder=workspace.folder,
    )
    reports = upload.beside(reports) if upload else reports
    try:
        with closing(reports):
            show_progress(reports, sum(plan.samples_of(number) for number in todo), console)
    finally:
        workspace.remove_partials()
    with explain_write_errors(workspace.out):
        manifest = _finish(options.seed, workspace, plan, settings)
    console.print(
        f"{workspace.split}: read {manifest.read:,} = written {manifest.samples:,} + rejected {manifest.rejected:,}"
        f"{f' (see {workspace.out / REJECTED})' if manifest.rejected else ''}; "
        f"{len(manifest.shards)} shards, {manifest.bytes / 1e6:,.1f} MB in {workspace.out}"
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
    check_remote_options(options.remote, options.src, options.source, options.out)
    source = None if is_remote(options.src) else Path(options.src)
    for name, folder in (("SRC", source), ("--masks", options.extra.masks)):
        if not folder or not folder.is_dir() or is_url(str(options.out)):
            continue
        if options.folder.resolve().is_relative_to(folder.resolve()):
            raise ShardError(f"OUT ({options.out}) is inside {name} ({folder}): use a folder outside the source")


def _settings(options: ShardingOptions, kind: str, subset: str | None, contents: str) -> dict[str, Any]:
    """Return everything that the shards' bytes depend on."""
    return {
        "source": kind,
        "subset": subset,
        "val_fraction": options.val_fraction,
        "contents": contents,
        "seed": options.seed,
        **asdict(options.image),
        **asdict(options.shard),
        "encoding": {"resized": RESIZED, "converted": CONVERTED},
        "software": codec_versions(),
    }

"""Making of the splits of a shard folder: list, plan, write in workers, write the manifest."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from shards.distributors import Distributor, open_distributor
from shards.errors import ShardError
from shards.existing_split import find_existing, known_columns
from shards.few_images import few_images_advice
from shards.format import REJECTED, Manifest, save_manifest, save_rejections
from shards.hold_out import TRAIN, VAL, hold_out
from shards.plan import ShardPlan, plan_shards, read_subset
from shards.remote_folder import RemoteFolder
from shards.remote_options import MIRROR
from shards.sharding_options import ShardingOptions as ShardingOptions
from shards.sharding_options import check_options, split_settings
from shards.source_record import find_finished, identify, save_record
from shards.sources.detect import detect, explain_read_errors, list_source
from shards.sources.remote_tars import find_tars, is_remote
from shards.sources.staged_tars import StagingFolder
from shards.upload import SplitUpload, default_work_dir, discard_local, remove_unused
from shards.urls import is_url
from shards.workers import show_progress
from shards.writer import ShardJob, ShardTask, SplitWorkdir, explain_write_errors, warn_of_small_disk, write_shard


def make_shards(options: ShardingOptions, console: Console) -> dict[str, Manifest]:
    """Make one split, or train and val, or resume an interrupted run with the same settings; return manifests by split.

    Raise ShardError, with the remedy, for invalid options, unusable sources, and read or write errors. Files get their
    final names only when they are complete, so a run can resume after any interruption.
    """
    check_options(options)
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
        lambda contents: split_settings(options, "webdataset", subset, contents),
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
            settings = split_settings(options, kind, subset.description if subset else None, plan.digest)
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

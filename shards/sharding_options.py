"""Options of the command that makes shards, and the settings that the bytes of a split depend on."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from shards.distributors import DistributorName
from shards.errors import ShardError
from shards.hold_out import TRAIN, VAL
from shards.images import CONVERTED, RESIZED, ImageOptions, codec_versions
from shards.plan import ShardSize
from shards.remote_options import RemoteOptions, check_remote_options
from shards.sources.detect import SourceKind, SourceOptions
from shards.sources.remote_tars import is_remote
from shards.urls import is_url

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


def check_options(options: ShardingOptions) -> None:
    """Raise ShardError, which names the option, for values out of range and options that exclude each other."""
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


def split_settings(options: ShardingOptions, kind: str, subset: str | None, contents: str) -> dict[str, Any]:
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

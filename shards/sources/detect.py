"""Detection and listing of sources, by kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from shards.errors import ShardError
from shards.listing import Labels, SampleList, list_members
from shards.sources import file_lists, image_folder, imagenet, text_list, webdataset
from shards.sources.remote_tars import is_remote

SourceKind = Literal["folder", "imagenet-train", "imagenet-val", "csv", "list", "coco", "masks", "webdataset"]

_NAMING: dict[str, SourceKind] = {".csv": "csv", ".txt": "list", ".json": "coco"}
"""Kind of a file that lists images, by its extension."""

_VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")


@dataclass(frozen=True)
class SourceOptions:
    """Choice of labels, and additional files that some kinds of sources need."""

    labels: Labels = "auto"
    """Labels of the samples. `auto`: those that the source has; a message names them and the other choice.
    First-level folders are classes if all images are in at least two of them, at the same depth.
    In a .txt file the class is the number after the path, or the path's folder if all paths are relative.
    `folders`: first-level folders of SRC, or the folder of each path of a .txt file, are the classes.
    `none`: no labels. A number after a path in a .txt file is still not a part of the path."""
    val_labels: Path | None = None
    """Labels of ImageNet's validation tar: the development kit (tar.gz or folder), or its ground-truth file.
    The ground-truth file needs meta.mat next to it.
    A text file with one synset per line, in the order of the file names, is accepted too."""
    images: Path | None = None
    """Location of the relative paths in a CSV file, a list or an annotation file. Default: the folder of that file.
    It is a folder, an uncompressed tar, or a folder inside such a tar, for example images.tar/data/images256."""
    masks: Path | None = None
    """Folder of segmentation masks for SRC, a folder of images. Such samples have no label.
    A mask has the path of its image except for the extension."""
    label_field: str = "label"
    """Field of a sample's .json that holds the label, for WebDataset tars without .cls.
    Samples without the default field have no label."""


def list_source(source: str, kind: SourceKind, extra: SourceOptions, staged: list[Path] | None = None) -> SampleList:
    """List the samples of a source as references. Raise ShardError where it cannot be read or is not of that kind.

    staged: copies of the tars of a remote source; None for one on a disk.
    """
    _check_source_options(source, kind, extra)
    if staged is None:
        listing = _list(source, kind, extra)
    else:
        listing = webdataset.list_tars(staged, extra.label_field, extra.labels)
    if listing.labelling:
        return listing
    classes = ", ".join(f"{column.name} ({len(column.classes):,} classes)" for column in listing.columns)
    return replace(
        listing, labelling=f"labels: {classes}; --labels none ignores them" if listing.columns else "no labels"
    )


def _list(source: str, kind: SourceKind, extra: SourceOptions) -> SampleList:
    path, labels = Path(source), extra.labels
    match kind:
        case "folder":
            return image_folder.list_folder(path, labels)
        case "csv":
            return file_lists.list_table(path, file_lists.make_resolver(extra.images or path.parent), labels)
        case "list":
            return text_list.list_lines(path, file_lists.make_resolver(extra.images or path.parent), labels)
        case "coco":
            return file_lists.list_annotations(path, file_lists.make_resolver(extra.images or path.parent), labels)
        case "masks":
            return image_folder.list_pairs(path, extra.masks)
        case "imagenet-train":
            return imagenet.list_train(path, labels)
        case "imagenet-val":
            return imagenet.list_val(path, extra.val_labels, labels)
        case "webdataset":
            return webdataset.list_tars(webdataset.expand(source), extra.label_field, labels)


def _check_source_options(source: str, kind: SourceKind, extra: SourceOptions) -> None:
    """Raise ShardError for an option that this kind of source does not use."""
    uses: dict[str, tuple[bool, str, tuple[SourceKind, ...]]] = {
        "--val-labels": (extra.val_labels is not None, "ImageNet's validation tar", ("imagenet-val",)),
        "--images": (extra.images is not None, "CSV files, lists and annotation files", ("csv", "list", "coco")),
        "--masks": (extra.masks is not None, "a folder of images", ("masks",)),
        "--labels folders": (extra.labels == "folders", "folders of images and .txt files", ("folder", "list")),
    }
    for option, (used, users, kinds) in uses.items():
        if used and kind not in kinds:
            raise ShardError(f"{option} is for {users}; {source} is of kind '{kind}' (see --source)")
    if extra.val_labels is not None and extra.labels == "none":
        raise ShardError("--val-labels gives labels, --labels none ignores them: omit one of the two")
    if extra.masks is not None and not extra.masks.is_dir():
        raise ShardError(f"--masks {extra.masks} is not a folder; correct the path")


def detect(source: str, extra: SourceOptions) -> SourceKind:
    """Detect the kind of a source from its path, its content and the additional files."""
    if is_remote(source):
        return "webdataset"
    path = Path(source)
    if path.is_dir():
        if extra.masks is not None:
            return "masks"
        visible = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        tars = any(entry.suffix == ".tar" for entry in visible)
        if not tars or any(entry.is_dir() for entry in visible):
            return "folder"
        images = [entry.name for entry in visible if image_folder.has_image_extension(entry.name)]
        if images:
            raise ShardError(
                f"{source} has both images ({images[0]}) and tars: use --source folder for the images, "
                "or --source webdataset for the tars"
            )
        return "webdataset"
    if path.suffix.lower() in _NAMING:
        if not path.is_file():
            raise ShardError(f"{source}: no such file; correct the source")
        # Places205's lists have the extension .csv.
        return "list" if path.suffix.lower() == ".csv" and text_list.is_list(path) else _NAMING[path.suffix.lower()]
    if not path.is_file():
        webdataset.expand(source)
        return "webdataset"
    if image_folder.has_image_extension(path.name):
        raise ShardError(f"{source} is one image; use its folder, or a .txt file of paths")
    if path.suffix.lower() == ".zip":
        raise ShardError(f"{source} is a zip archive; unpack it and use the folder")
    names = [member.name for member in islice(list_members(path), 1)]
    if not names:
        raise ShardError(f"{source} is an empty tar; correct the source")
    if names[0].endswith(".tar"):
        return "imagenet-train"
    return "imagenet-val" if _VAL_IMAGE.fullmatch(names[0]) else "webdataset"


@contextmanager
def explain_read_errors(source: str) -> Iterator[None]:
    """Convert an OSError about a source to a ShardError with a remedy."""
    try:
        yield
    except OSError as error:
        path = error.filename or source
        raise ShardError(f"cannot read {path}: {error.strerror}; correct the path or the permissions") from error

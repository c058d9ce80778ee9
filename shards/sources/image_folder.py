"""Sources that are folders: images at any depth, in class folders or not, or images with masks.

Class folders are the first level of the source and may contain nested folders. Images with segmentation masks are two
parallel folders, the form in which ADE20k is distributed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import ShardError
from shards.format import Column, RejectionRecord
from shards.listing import LABEL, Labels, SampleList, sample_key
from shards.samples import FileRef, Sample

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


def list_folder(folder: Path, labels: Labels) -> SampleList:
    """List all files below a folder as samples, with their paths without the extension as keys.

    With class folders each image has its first-level folder as label, and a file outside them is rejected. `folders`
    demands them; `auto` takes the first-level folders as classes where `_not_classes` finds nothing against it. Links
    are followed. Hidden files and folders are counted and ignored. Raise ShardError for splits in place of classes, and
    for `folders` without a class folder.
    """
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes and labels == "folders":
        raise ShardError(
            f"{folder} has no class folders: put the images of each class into a separate folder, "
            "or list the images in a CSV file with the columns path and label, or omit --labels folders"
        )
    refuse_splits(folder, classes)
    listing = SampleList([])
    samples, seen = listing.samples, _SeenImages()
    tuples = {name: (name,) for name in classes}
    for stem, image in _files(folder, listing):
        if has_image_extension(image.name):
            seen.add(image.name)
        class_name, _, rest = image.name.partition("/")
        samples.append(Sample(sample_key(stem), image, tuples[class_name] if rest else ()))
    reason = _not_classes(seen, classes) if labels == "auto" else None
    if labels == "none" or reason:
        samples.drop_labels()
        listing.labelling = f"no labels: {reason}" if reason else "no labels"
        return listing
    listing.columns = [Column(LABEL, "cls", classes)]
    listing.labelling = f"labels: {len(classes):,} class folders; --labels none ignores them"
    inside = np.fromiter((bool(labels) for _, _, labels, _ in samples.contents()), bool, len(samples))
    if not inside.all():
        reason = "is outside the class folders, so it has no class"
        outside = samples.take(np.flatnonzero(~inside))
        listing.rejections += [RejectionRecord(sample.image.name, reason) for sample in outside]
        listing.samples = samples.take(np.flatnonzero(inside))
    return listing


@dataclass
class _SeenImages:
    """Facts about the names of images below a folder: those in no folder, the first-level folders, the depths."""

    outside: int = 0
    first_outside: str = ""
    folders: set[str] = field(default_factory=set)
    by_depth: dict[int, str] = field(default_factory=dict)
    """The last name at each depth."""

    def add(self, name: str) -> None:
        if "/" not in name:
            self.first_outside = self.first_outside or name
            self.outside += 1
        self.folders.add(name.partition("/")[0])
        self.by_depth[name.count("/")] = name


def _not_classes(images: _SeenImages, folders: list[str]) -> str | None:
    """Return why the first-level folders are not taken as classes, with the way to labels; None where they are.

    They are classes where every image lies in one of them, all at the same depth, and at least two have images. Only
    names with the extension of an image count.
    """
    if not folders:
        return "there are no class folders; a CSV file with the columns path and label gives labels"
    if images.outside:
        return (
            f"images lie outside class folders ({images.outside:,}, first: {images.first_outside!r}); "
            "--labels folders rejects them and takes the first-level folders as classes"
        )
    used = images.folders
    if len(used) < 2:
        where = f"all images are in the folder {min(used)!r}" if used else "no file has the extension of an image"
        return f"{where}; --labels folders takes the first-level folders as classes"
    if len(images.by_depth) > 1:
        one, other, *_ = images.by_depth.values()
        return (
            f"images lie at different depths ({one!r}, {other!r}); "
            "--labels folders takes the first-level folders as classes"
        )
    return None


def has_image_extension(name: str) -> bool:
    """Return True where the name has the extension of a format that Pillow opens."""
    kind = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return kind in Image.OPEN


def refuse_splits(folder: Path, inside: Collection[str]) -> None:
    """Raise ShardError where the folders in `folder`, named `inside`, are the splits of a data set."""
    if inside and set(inside) <= _SPLIT_NAMES:
        raise ShardError(
            f"the folders of {folder} are splits, not classes: use one of them, e.g. {folder / min(inside)}"
        )


def no_file(entry: os.DirEntry[str]) -> str | None:
    """Return the reason why the entry is not a readable file, or None where it is one."""
    if entry.is_file():
        return None
    return "is a broken link" if entry.is_symlink() else "is not a regular file"


def walk(folder: Path, listing: SampleList) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Yield everything below `folder` except folders, with its path relative to `folder`, in the order of names.

    Links are followed. Hidden files and folders are counted in `listing.hidden`; link loops are added to
    `listing.rejections`.
    """
    return _walk(folder, "", (), listing)


def _walk(
    folder: Path, prefix: str, above: tuple[tuple[int, int], ...], listing: SampleList
) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Walk the folder `prefix`. `above`: device and inode of each of its parent folders."""
    status = os.stat(folder / prefix)
    if (status.st_dev, status.st_ino) in above:
        listing.rejections.append(RejectionRecord(prefix, "links to a folder that contains it"))
        return
    with os.scandir(folder / prefix) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.name.startswith("."):
                listing.hidden += 1
            elif entry.is_dir():
                yield from _walk(folder, name, (*above, (status.st_dev, status.st_ino)), listing)
            else:
                yield entry, name


def list_pairs(images: Path, masks: Path | None) -> SampleList:
    """List images with their masks, which have the same path without the extension; that path is the key. No labels.

    Hidden files are counted and ignored. A mask without an image is rejected. Raise ShardError for images without a
    mask, for two masks of one image, and where the folder contains splits.
    """
    if masks is None:
        raise ShardError(f"{images}: images with masks need the folder of their masks too; use --masks")
    with os.scandir(images) as entries:
        refuse_splits(images, {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")})
    listing = SampleList([], masks=True)
    mask_of: dict[str, FileRef] = {}
    for stem, mask in _files(masks, listing):
        if stem in mask_of:
            raise ShardError(f"{masks} has two masks of one image, {mask_of[stem].name} and {mask.name}: remove one")
        mask_of[stem] = mask
    missing = []
    found = set()
    for stem, image in _files(images, listing):
        found.add(stem)
        if stem in mask_of:
            listing.samples.append(Sample(sample_key(stem), image, (), mask_of[stem]))
        else:
            missing.append(image.name)
    if missing:
        raise ShardError(
            f"{len(missing):,} of {len(missing) + len(listing.samples):,} images of {images} have no mask in {masks} "
            f"(first: {', '.join(missing[:3])}): use the masks of the same split, or unpack them again"
        )
    listing.rejections += [
        RejectionRecord(mask.name, f"is a mask without an image in {images}")
        for stem, mask in mask_of.items()
        if stem not in found
    ]
    return listing


def _files(folder: Path, listing: SampleList) -> Iterator[tuple[str, FileRef]]:
    """Yield (path without extension, reference) of each file below `folder`; reject entries that are not files."""
    for entry, name in walk(folder, listing):
        reason = no_file(entry)
        if reason:
            listing.rejections.append(RejectionRecord(name, reason))
        else:
            yield os.path.splitext(name)[0], FileRef(str(folder), name, None, entry.stat().st_size)

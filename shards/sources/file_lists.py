"""Sources that are a table of image paths and labels: CSV, COCO-like JSON; paths in folders and tars.

A CSV file has a `path` column, any number of label columns and optionally a `mask` column. Paths are absolute, or
relative to a folder or an uncompressed tar.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.format import Column, RejectedSample, RejectionRecord
from shards.listing import LABEL, Labels, SampleList, TarMember, column, file_ref, list_members, sample_key
from shards.samples import FileRef, Sample

PathResolver = Callable[[str], FileRef]
"""Function from a path to a reference; raises RejectedSample where there is no such image."""


def read_path(text: str) -> str:
    """Return the normalised path that a file names, without `./`.

    A path with a leading slash is absolute if that file exists. Otherwise it is relative, without the slash (SUN397).
    """
    path = os.path.normpath(text)
    return path if not path.startswith("/") or os.path.isfile(path) else path.lstrip("/")


def make_resolver(place: Path) -> PathResolver:
    """Make a resolver of absolute paths and of paths in `place`.

    `place` is a folder, a tar, or a folder inside a tar, e.g. `images.tar/data/images256`. Raise ShardError where it is
    none of these.
    """
    if place.is_dir():
        return partial(file_ref, place)
    for tar in (place, *place.parents):
        if tar.is_file():
            inside = str(place.relative_to(tar))
            return partial(_member, tar, "" if inside == "." else inside, _members(tar))
    raise ShardError(f"--images {place}: no such folder or tar; correct the path")


def _members(tar: Path) -> dict[str, TarMember]:
    return {os.path.normpath(member.name): member for member in list_members(tar)}


def _member(tar: Path, folder: str, members: dict[str, TarMember], name: str) -> FileRef:
    if name.startswith("/"):
        return file_ref(tar.parent, name)
    path = os.path.normpath(os.path.join(folder, name))
    if path not in members:
        raise RejectedSample(f"no such file: {tar}/{path}")
    member = members[path]
    return FileRef(str(tar), f"{tar.name}/{path}", member.offset, member.size)


def list_annotations(file: Path, find: PathResolver, labels: Labels) -> SampleList:
    """List COCO-like annotations with one class per image (iNaturalist); the classes are the category ids.

    With `none` only `images` is read. An image that does not exist is rejected. Raise ShardError for JSON of another
    form, an image with no annotation or several, and undeclared ids.
    """
    try:
        document = json.loads(decode_text(file, file.read_bytes()))
        names: dict[Any, str] = {image["id"]: str(image["file_name"]) for image in document["images"]}
        if labels == "none":
            return unlabelled(names.values(), find, "no labels")
        categories = {_class_number(category["id"]) for category in document["categories"]}
        annotations = [(item["image_id"], item["category_id"]) for item in document["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{file} is not a file of COCO-like annotations ({error!r}): it must have 'images' with id and file_name, "
            "'categories' with id, and 'annotations' with image_id and category_id"
        ) from error
    category_of: dict[Any, str] = {}
    for image, category in annotations:
        if image not in names:
            raise ShardError(f"{file}: an annotation refers to image {image!r}, not in 'images'; download it again")
        if str(category) not in categories:
            raise ShardError(
                f"{file}: {names[image]} has category {category!r}, not in 'categories'; download it again"
            )
        if image in category_of:
            raise ShardError(
                f"{file}: {names[image]} has several annotations; use a file with one class per image, or --labels none"
            )
        category_of[image] = str(category)
    bare = [name for image, name in names.items() if image not in category_of]
    if bare:
        raise ShardError(
            f"{file}: {len(bare):,} of {len(names):,} images have no annotation (first: {bare[0]}); "
            "use the annotations of a labelled split, e.g. train2018.json, or --labels none"
        )
    return labelled(((name, category_of[image]) for image, name in names.items()), find, categories)


def labelled(rows: Iterable[tuple[str, str]], find: PathResolver, classes: set[str]) -> SampleList:
    """List images, given as path and class, with one label column."""
    # All images of a class share one tuple, which saves memory for millions of images.
    labels = {label: (label,) for label in classes}
    return _listing(((name, labels[label]) for name, label in rows), find, [column(LABEL, classes)])


def unlabelled(names: Iterable[str], find: PathResolver, labelling: str) -> SampleList:
    """List images by their paths, without labels. `labelling` is the message to the user."""
    listing = _listing(((name, ()) for name in names), find, [])
    listing.labelling = labelling
    return listing


def _listing(rows: Iterable[tuple[str, tuple[str, ...]]], find: PathResolver, columns: list[Column]) -> SampleList:
    listing = SampleList(columns)
    for name, labels in rows:
        try:
            key, image = _find(find, name)
        except RejectedSample as reason:
            listing.rejections.append(RejectionRecord(name, str(reason)))
        else:
            listing.samples.append(Sample(key, image, labels))
    return listing


def _find(find: PathResolver, name: str) -> tuple[str, FileRef]:
    """Return key and image of a path. Raise RejectedSample, with all readings of the path, where there is no image."""
    path = read_path(name)
    try:
        return sample_key(os.path.splitext(path)[0]), find(path)
    except RejectedSample as reason:
        raise RejectedSample(f"{reason}, nor {name}" if name.startswith("/") else str(reason)) from None


def _class_number(value: object) -> str:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"category id {value!r} is not a non-negative integer")
    return str(value)


def decode_text(file: Path, content: bytes) -> str:
    """Return the text of a file. Raise ShardError where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ShardError(f"{file} is not UTF-8 text ({error}); convert it to UTF-8") from error


def list_table(table: Path, find: PathResolver, labels: Labels) -> SampleList:
    """List a CSV file with one sample per row; the key is the path without its extension.

    All columns except `path` and `mask` are labels, and `label` is the main one; with `none` they are ignored. `find`
    resolves the paths of image and mask. A row with a missing file or an empty field is rejected. Raise ShardError for
    a file that is not CSV in UTF-8 and for an invalid header.
    """
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            header = list(reader.fieldnames or [])
            names = _label_names(table, header)
            if labels == "none":
                names = []
            listing = SampleList([], masks="mask" in header)
            cache: dict[tuple[str, ...], tuple[str, ...]] = {}
            for row in reader:
                try:
                    sample = _sample(find, row, names)
                except RejectedSample as reason:
                    path = row.get("path") or f"{table.name}, line {reader.line_num}"
                    listing.rejections.append(RejectionRecord(path, str(reason)))
                else:
                    # Rows with the same labels share one tuple, which saves memory for millions of rows.
                    listing.samples.append(sample._replace(labels=cache.setdefault(sample.labels, sample.labels)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ShardError(f"{table}, about line {reader.line_num}: not CSV in UTF-8 ({error})") from error
    listing.columns = [column(name, (labels[place] for labels in cache)) for place, name in enumerate(names)]
    return listing


def _label_names(table: Path, header: list[str]) -> list[str]:
    if "path" not in header:
        raise ShardError(
            f"{table} has no column 'path': its first line must name the columns, but is {header}; "
            "a list of paths alone needs the extension .txt, or --source list"
        )
    if len(set(header)) != len(header):
        raise ShardError(f"{table} names a column twice: {header}; rename one of them")
    return sorted((name for name in header if name not in ("path", "mask")), key=lambda name: name != LABEL)


def _sample(find: PathResolver, row: dict[str, str], names: list[str]) -> Sample:
    if None in row or None in row.values():
        raise RejectedSample("its number of fields is not the number of columns")
    for name in ("path", *names, *(["mask"] if "mask" in row else [])):
        if not row[name].strip():
            raise RejectedSample(f"'{name}' is empty")
    mask = _mask(find, row["mask"]) if "mask" in row else None
    key, image = _find(find, row["path"])
    return Sample(key, image, tuple(row[name].strip() for name in names), mask)


def _mask(find: PathResolver, name: str) -> FileRef:
    try:
        return _find(find, name)[1]
    except RejectedSample as reason:
        raise RejectedSample(f"mask: {reason}") from reason

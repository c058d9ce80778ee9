"""Sources that are a file of image paths and labels: text list, CSV, COCO-like JSON.

A CSV file has a `path` column, any number of label columns and optionally a `mask` column. The images that the file
names are below a folder or in an uncompressed tar.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.format import RejectedSample, RejectionRecord
from shards.listing import LABEL, FileRef, Sample, SampleList, TarMember, column, file_ref, list_members, sample_key

PathResolver = Callable[[str], FileRef]
"""Function from a path in the file to a reference; raises RejectedSample where there is no such image."""


def make_resolver(place: Path) -> PathResolver:
    """Make a resolver for `place`: a folder, a tar, or a folder inside a tar, e.g. `images.tar/data/images256`.

    Raise ShardError where `place` is none of these.
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
    path = os.path.normpath(os.path.join(folder, name))
    if path not in members:
        raise RejectedSample(f"no such file: {tar}/{path}")
    member = members[path]
    return FileRef(str(tar), f"{tar.name}/{path}", member.offset, member.size)


_WITH_CLASS = re.compile(r"(\S.*?)\s+(\d+)")


def is_list(file: Path) -> bool:
    """Return True where the first line of a .csv file is a path, a space and a class index, without a comma."""
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        first = lines.readline().strip()
    return "," not in first and _WITH_CLASS.fullmatch(first) is not None


def list_lines(file: Path, find: PathResolver) -> SampleList:
    """List a text file with one image per line: `PATH NUMBER` (Places205), or `PATH` with its folder as class (SUN397).

    A leading slash is ignored. A line whose image does not exist is rejected. Raise ShardError for a list that is empty
    or mixes the two forms, and for an image without a class.
    """
    text = _read(file).splitlines()
    lines = {number: line.strip() for number, line in enumerate(text, start=1) if line.strip()}
    if not lines:
        raise ShardError(f"{file} is empty: it must have one image path per line")
    parsed = {number: _WITH_CLASS.fullmatch(line) for number, line in lines.items()}
    if any(parsed.values()) and not all(parsed.values()):
        odd = next(number for number, match in parsed.items() if not match)
        raise ShardError(f"{file}, line {odd}: no class number after the path, unlike other lines; add it")
    rows = []
    for number, line in lines.items():
        match = parsed[number]
        name = (match[1] if match else line).lstrip("/")
        label = match[2] if match else os.path.dirname(name)
        if not label:
            raise ShardError(
                f"{file}, line {number}: '{line}' has no class: add a class number after the path, "
                "or put the image into a folder named after its class"
            )
        rows.append((name, str(int(label)) if match else label))
    return _listing(rows, find, classes={label for _, label in rows})


def list_annotations(file: Path, find: PathResolver) -> SampleList:
    """List COCO-like annotations with one class per image (iNaturalist); the classes are the category ids.

    An image that does not exist is rejected. Raise ShardError for JSON of another form, an image with no annotation or
    several, and undeclared ids.
    """
    try:
        document = json.loads(_read(file))
        names: dict[Any, str] = {image["id"]: str(image["file_name"]) for image in document["images"]}
        categories = {_class_number(category["id"]) for category in document["categories"]}
        annotations = [(item["image_id"], item["category_id"]) for item in document["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{file} is not a file of COCO-like annotations ({error!r}): it must have 'images' with id and file_name, "
            "'categories' with id, and 'annotations' with image_id and category_id"
        ) from error
    labels: dict[Any, str] = {}
    for image, category in annotations:
        if image not in names:
            raise ShardError(f"{file}: an annotation refers to image {image!r}, not in 'images'; download it again")
        if str(category) not in categories:
            raise ShardError(
                f"{file}: {names[image]} has category {category!r}, not in 'categories'; download it again"
            )
        if image in labels:
            raise ShardError(f"{file}: {names[image]} has several annotations; use a file with one class per image")
        labels[image] = str(category)
    bare = [name for image, name in names.items() if image not in labels]
    if bare:
        raise ShardError(
            f"{file}: {len(bare):,} of {len(names):,} images have no annotation (first: {bare[0]}); "
            "use the annotations of a labelled split, e.g. train2018.json"
        )
    return _listing(((name, labels[image]) for image, name in names.items()), find, categories)


def _listing(rows: Iterable[tuple[str, str]], find: PathResolver, classes: set[str]) -> SampleList:
    listing = SampleList([column(LABEL, classes)])
    # All images of a class share one tuple, which saves memory for millions of images.
    labels = {label: (label,) for label in classes}
    for name, label in rows:
        try:
            image = find(name)
        except RejectedSample as reason:
            listing.rejections.append(RejectionRecord(name, str(reason)))
        else:
            listing.samples.append(Sample(sample_key(os.path.splitext(name)[0]), image, labels[label]))
    return listing


def _class_number(value: object) -> str:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"category id {value!r} is not a non-negative integer")
    return str(value)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ShardError(f"{file} is not UTF-8 text ({error}); convert it to UTF-8") from error


def list_table(table: Path, find: PathResolver) -> SampleList:
    """List a CSV file with one sample per row; the key is the path without its extension.

    All columns except `path` and `mask` are labels, and `label` is the main one. `find` resolves the paths of image and
    mask. A row with a missing file or an empty field is rejected. Raise ShardError for a file that is not CSV in UTF-8
    and for an invalid header.
    """
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            header = list(reader.fieldnames or [])
            names = _label_names(table, header)
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
        raise ShardError(f"{table} has no column 'path': its first line must name the columns, but is {header}")
    if len(set(header)) != len(header):
        raise ShardError(f"{table} names a column twice: {header}; rename one of them")
    return sorted((name for name in header if name not in ("path", "mask")), key=lambda name: name != LABEL)


def _sample(find: PathResolver, row: dict[str, str], names: list[str]) -> Sample:
    for name, value in row.items():
        if name is None or value is None:
            raise RejectedSample("its number of fields is not the number of columns")
        if not value.strip():
            raise RejectedSample(f"'{name}' is empty")
    mask = _mask(find, row["mask"]) if "mask" in row else None
    image = find(row["path"])
    return Sample(sample_key(os.path.splitext(row["path"])[0]), image, tuple(row[n].strip() for n in names), mask)


def _mask(find: PathResolver, name: str) -> FileRef:
    try:
        return find(name)
    except RejectedSample as reason:
        raise RejectedSample(f"mask: {reason}") from reason

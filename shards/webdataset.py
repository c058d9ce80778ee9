"""A source: tars that are WebDataset shards already, ours or others'."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from braceexpand import braceexpand
from PIL import Image

from shards.listing import LABEL, Listing, Reference, Sample, column, sample_key
from shards.manifest import MANIFEST, Manifest, ShardError, list_splits, load_manifest
from shards.rejection import Rejected, Rejection
from shards.tars import Member, list_members

MASK = "mask.png"
"""Component of the segmentation mask."""

_KEPT_KEY = re.compile(r"[A-Za-z0-9_%~-]+")


def expand(pattern: str) -> list[Path]:
    """The tars of a folder, a brace pattern (`train-{000000..000007}.tar`) or a glob; ShardError for one not there."""
    if Path(pattern).is_dir():
        return sorted(Path(pattern).glob("*.tar"))
    names = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else list(braceexpand(pattern))
    missing = [name for name in names if not Path(name).is_file()]
    if missing or not names:
        raise ShardError(f"{missing[0] if missing else pattern}: no such file; correct the source")
    return [Path(name) for name in names]


def list_tars(tars: list[Path], label_field: str) -> Listing:
    """One sample a key: its image, its labels (`cls` or the json's `label_field`, and any `NAME.cls`), its `mask.png`.

    The first sample says which labels there are and whether there are masks; others that differ are rejected, as are
    samples without an image or with two. Keys made of letters, digits, `_`, `-`, `%`, `~` are kept. Where a manifest of
    ours stands beside the tars it names the classes; else labels are names, or integers that stand for themselves.
    """
    ours = _own_manifest(tars)
    listing = Listing([])
    names: list[str] | None = None
    cache: dict[tuple[str, ...], tuple[str, ...]] = {}
    for tar in tars:
        with open(tar, "rb") as file:
            for base, components in _group(list_members(tar)):
                if not Path(base).name:
                    listing.hidden += len(components)
                    continue
                try:
                    image = components[_image_component(components)]
                    labels = _labels(file.fileno(), components, label_field, ours)
                    mask = components.get(MASK)
                    if names is None:
                        names, listing.masks = list(labels), mask is not None
                    if list(labels) != names or (mask is not None) != listing.masks:
                        raise Rejected(f"has the labels {list(labels)}{' and a mask' * bool(mask)}, unlike the first")
                except Rejected as reason:
                    listing.rejections.append(Rejection(f"{tar.name}/{base}", str(reason)))
                    continue
                key = base if _KEPT_KEY.fullmatch(base) else sample_key(base)
                # One object for all samples with the same labels: a million samples have few different ones.
                values = cache.setdefault(tuple(labels.values()), tuple(labels.values()))
                listing.samples.append(Sample(key, _reference(tar, image), values, mask and _reference(tar, mask)))
    for place, name in enumerate(names or []):
        listing.columns.append(ours.column(name) if ours else column(name, {labels[place] for labels in cache}))
    return listing


def _own_manifest(tars: list[Path]) -> Manifest | None:
    folder = tars[0].parent
    if any(tar.parent != folder for tar in tars) or not (folder / MANIFEST).exists():
        return None
    try:
        splits = [load_manifest(folder, split) for split in list_splits(folder)]
    except ShardError:
        return None  # another program's file of the same name
    wanted = {tar.name for tar in tars}
    touched = [split for split in splits if wanted & {shard.name for shard in split.shards}]
    if len(touched) > 1:
        names = [split.split for split in touched]
        raise ShardError(f"{folder} holds the splits {names}: name the tars of one, as '{folder}/{names[0]}-*.tar'")
    return touched[0] if touched and wanted <= {shard.name for shard in touched[0].shards} else None


def _group(members: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """WebDataset's rule: members in a row that agree up to the first dot of the file name are one sample's components.

    A component that comes again begins another sample, of the same key.
    """
    current, components = "", dict[str, Member]()
    for member in members:
        folder, slash, file = member.name.rpartition("/")
        stem, _, component = file.partition(".")
        base = folder + slash + stem
        if components and (base != current or component.lower() in components):
            yield current, components
            components = {}
        current = base
        components[component.lower()] = member
    if components:
        yield current, components


def _image_component(components: dict[str, Member]) -> str:
    images = [name for name in components if f".{name}" in Image.registered_extensions()]
    if len(images) != 1:
        raise Rejected(f"has {len(images)} images among its components {sorted(components)}")
    return images[0]


def _labels(file: int, components: dict[str, Member], label_field: str, ours: Manifest | None) -> dict[str, str]:
    """Column name → class name, the main label first."""
    labels = {}
    if "cls" not in components and "json" in components:
        try:
            document = json.loads(_read(file, components["json"]))
            labels[LABEL] = _text(document[label_field]) if label_field in document else ""
        except (ValueError, TypeError) as error:
            raise Rejected(f"its json cannot be read: {error}") from error
        if not labels[LABEL]:
            raise Rejected(f"its json has no field '{label_field}' (label_field)")
    for name in sorted(components, key=lambda name: (name != "cls", name)):
        if name == "cls" or name.endswith(".cls"):
            try:
                labels[name.removesuffix(".cls") if name != "cls" else LABEL] = (
                    _read(file, components[name]).decode().strip()
                )
            except UnicodeDecodeError as error:
                raise Rejected(f"its {name} is no text: {error}") from error
    if "" in labels.values():
        raise Rejected("has an empty label")
    return {name: _class_name(name, value, ours) for name, value in labels.items()}


def _text(value: object) -> str:
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        raise TypeError(f"label {value!r} is neither a number nor a name")
    return str(value)


def _class_name(name: str, value: str, ours: Manifest | None) -> str:
    if ours is None:
        return value
    classes = ours.column(name).classes
    if not value.isdecimal() or int(value) >= len(classes):
        raise Rejected(f"label '{name}' is {value!r}, the manifest has {len(classes)} classes")
    return classes[int(value)]


def _read(file: int, member: Member) -> bytes:
    return os.pread(file, member.size, member.offset)


def _reference(tar: Path, member: Member) -> Reference:
    return Reference(str(tar), f"{tar.name}/{member.name}", member.offset, member.size)

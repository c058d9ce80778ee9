"""Source: WebDataset tars, from this project or another program."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from braceexpand import braceexpand
from PIL import Image

from shards.errors import ShardError
from shards.format import MANIFEST, Manifest, RejectedSample, RejectionRecord, list_splits, load_manifest
from shards.listing import LABEL, Labels, SampleList, TarMember, column, list_members, sample_key
from shards.samples import FileRef, Sample

MASK = "mask.png"
"""Tar component of the segmentation mask."""

_KEPT_KEY = re.compile(r"[A-Za-z0-9_%~-]+")


def expand(pattern: str) -> list[Path]:
    """Return the tars of a folder, a brace pattern (`train-{000000..000007}.tar`) or a glob.

    Raise ShardError where one does not exist.
    """
    if Path(pattern).is_dir():
        return sorted(Path(pattern).glob("*.tar"))
    names = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else list(braceexpand(pattern))
    missing = [name for name in names if not Path(name).is_file()]
    if missing or not names:
        raise ShardError(f"{missing[0] if missing else pattern}: no such file; correct the source")
    return [Path(name) for name in names]


def list_tars(tars: list[Path], label_field: str, labels: Labels) -> SampleList:
    """List one sample per key: image, labels (`cls` or `label_field` of the json, and any `NAME.cls`), and `mask.png`.

    Samples with other labels than the first, with a mask where the first has none or the reverse, and without exactly
    one image are rejected. A json without the field `label` gives no label; without another `label_field`, the sample
    is rejected. Labels `none` ignores them all. Keys of letters, digits, `_`, `-`, `%`, `~` are kept. Where a manifest
    of this project is next to the tars, it names the classes; otherwise labels are class names, or integers that are
    class indices.
    """
    ours = _own_manifest(tars)
    listing = SampleList([])
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
                    found = {} if labels == "none" else _labels(file.fileno(), components, label_field, ours)
                    mask = components.get(MASK)
                    if names is None:
                        names, listing.masks = list(found), mask is not None
                    if list(found) != names or (mask is not None) != listing.masks:
                        mask_text = " and a mask" if mask else ""
                        raise RejectedSample(f"has the labels {list(found)}{mask_text}, unlike the first sample")
                except RejectedSample as reason:
                    listing.rejections.append(RejectionRecord(f"{tar.name}/{base}", str(reason)))
                    continue
                key = base if _KEPT_KEY.fullmatch(base) else sample_key(base)
                # Samples with the same labels share one tuple, which saves memory for millions of samples.
                values = cache.setdefault(tuple(found.values()), tuple(found.values()))
                listing.samples.append(Sample(key, _reference(tar, image), values, mask and _reference(tar, mask)))
    for place, name in enumerate(names or []):
        listing.columns.append(ours.column(name) if ours else column(name, {values[place] for values in cache}))
    return listing


def _own_manifest(tars: list[Path]) -> Manifest | None:
    folder = tars[0].parent
    if any(tar.parent != folder for tar in tars) or not (folder / MANIFEST).exists():
        return None
    try:
        splits = [load_manifest(folder, split) for split in list_splits(folder)]
    except ShardError:
        return None  # a file of the same name from another program
    tar_names = {tar.name for tar in tars}
    touched = [split for split in splits if tar_names & {shard.name for shard in split.shards}]
    if len(touched) > 1:
        names = [split.split for split in touched]
        raise ShardError(f"{folder} has the splits {names}: use the tars of one, e.g. '{folder}/{names[0]}-*.tar'")
    return touched[0] if touched and tar_names <= {shard.name for shard in touched[0].shards} else None


def _group(members: Iterator[TarMember]) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """Group members by WebDataset's rule: consecutive members with the same path up to the file name's first dot.

    A repeated component begins another sample with the same key.
    """
    current, components = "", dict[str, TarMember]()
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


def _image_component(components: dict[str, TarMember]) -> str:
    images = [name for name in components if f".{name}" in Image.registered_extensions()]
    if len(images) != 1:
        raise RejectedSample(f"has {len(images)} images among its components {sorted(components)}")
    return images[0]


def _labels(file: int, components: dict[str, TarMember], label_field: str, ours: Manifest | None) -> dict[str, str]:
    """Return column name → class name, with the main label first. Raise RejectedSample for an unreadable label."""
    labels = {}
    if "cls" not in components and "json" in components:
        try:
            document = json.loads(_read(file, components["json"]))
            if label_field in document:
                labels[LABEL] = _text(document[label_field])
        except (ValueError, TypeError) as error:
            raise RejectedSample(f"its json cannot be read: {error}") from error
        if LABEL not in labels and label_field != LABEL:
            raise RejectedSample(f"its json has no field '{label_field}' (label_field)")
    for name in sorted(components, key=lambda name: (name != "cls", name)):
        if name == "cls" or name.endswith(".cls"):
            try:
                labels[name.removesuffix(".cls") if name != "cls" else LABEL] = (
                    _read(file, components[name]).decode().strip()
                )
            except UnicodeDecodeError as error:
                raise RejectedSample(f"its {name} is not text: {error}") from error
    if "" in labels.values():
        raise RejectedSample("has an empty label")
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
        raise RejectedSample(f"label '{name}' is {value!r}, the manifest has {len(classes)} classes")
    return classes[int(value)]


def _read(file: int, member: TarMember) -> bytes:
    return os.pread(file, member.size, member.offset)


def _reference(tar: Path, member: TarMember) -> FileRef:
    return FileRef(str(tar), f"{tar.name}/{member.name}", member.offset, member.size)

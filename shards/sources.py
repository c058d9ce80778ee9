"""Which kind of source is it, and what is in it? The kinds themselves are one module each."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Literal

from shards import folder, imagenet, table, webdataset
from shards.listing import Listing
from shards.manifest import ShardError
from shards.tars import list_members

Kind = Literal["folder", "imagenet-train", "imagenet-val", "csv", "webdataset"]

_VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")


def list_source(source: str, kind: Kind, val_labels: Path | None, label_field: str) -> Listing:
    """Everything in the source, as references. Raises ShardError where it cannot be read or is not of that kind."""
    if val_labels is not None and kind != "imagenet-val":
        raise ShardError(f"--val-labels is for ImageNet's validation tar; {source} is of kind '{kind}' (see --source)")
    match kind:
        case "folder":
            return folder.list_folder(Path(source))
        case "csv":
            return table.list_table(Path(source))
        case "imagenet-train":
            return imagenet.list_train(Path(source))
        case "imagenet-val":
            return imagenet.list_val(Path(source), val_labels)
        case "webdataset":
            return webdataset.list_tars(webdataset.expand(source), label_field)


def detect(source: str) -> Kind:
    """The kind of a source, from what stands at its place."""
    path = Path(source)
    if path.is_dir():
        visible = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        tars = any(entry.suffix == ".tar" for entry in visible)
        return "webdataset" if tars and not any(entry.is_dir() for entry in visible) else "folder"
    if path.suffix.lower() == ".csv":
        if not path.is_file():
            raise ShardError(f"{source}: no such file; correct the source")
        return "csv"
    if not path.is_file():
        webdataset.expand(source)
        return "webdataset"
    names = [member.name for member in islice(list_members(path), 1)]
    if not names:
        raise ShardError(f"{source} is an empty tar")
    if names[0].endswith(".tar"):
        return "imagenet-train"
    return "imagenet-val" if _VAL_IMAGE.fullmatch(names[0]) else "webdataset"

"""A source: ImageNet-1k's two tars exactly as they are distributed, read in place.

`ILSVRC2012_img_train.tar` holds a tar per class, named by its synset (as n01440764). `ILSVRC2012_img_val.tar` holds the
images bare; their classes are in the development kit, as ids that are *not* positions among the sorted synsets.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

from shards.listing import LABEL, Listing, Reference, Sample, sample_key
from shards.manifest import Column, ShardError
from shards.tars import Member, list_members

_SYNSET = re.compile(r"n\d{8}")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_READS_AT_ONCE = 8


def list_train(tar: Path) -> Listing:
    """Classes are the sorted synsets; a sample's key is its file name without the ending, as `n01440764_10026`."""
    class_tars = list(list_members(tar))
    for class_tar in class_tars:
        if not (class_tar.name.endswith(".tar") and _SYNSET.fullmatch(Path(class_tar.name).stem)):
            raise ShardError(f"{tar} holds {class_tar.name}: the training tar holds only tars named by synset")
    listing = Listing([Column(LABEL, "cls", sorted(Path(class_tar.name).stem for class_tar in class_tars))])
    # A million headers, each found only by reading the one before it: threads wait for several disk reads at a time.
    with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        for samples in threads.map(partial(_list_class, tar), class_tars):
            listing.samples += samples
    return listing


def _list_class(tar: Path, class_tar: Member) -> list[Sample]:
    labels = (Path(class_tar.name).stem,)
    return [
        Sample(
            sample_key(os.path.splitext(member.name)[0]),
            Reference(str(tar), f"{class_tar.name}/{member.name}", member.offset, member.size),
            labels,
        )
        for member in list_members(tar, within=class_tar)
    ]


def list_val(tar: Path, val_labels: Path | None) -> Listing:
    """The validation tar. Its n-th label belongs to the n-th image by name, however the tar is ordered.

    `val_labels`: the development kit (`ILSVRC2012_devkit_t12.tar.gz` or the folder it unpacks to), its ground-truth
    file with `meta.mat` beside it, or a text file with one synset a line.
    """
    if val_labels is None:
        raise ShardError(
            f"{tar} has no labels of its own: give --val-labels ILSVRC2012_devkit_t12.tar.gz, "
            "or a text file with one synset a line in the order of the file names"
        )
    members = sorted(list_members(tar))
    synsets, classes = read_val_labels(val_labels)
    if len(synsets) != len(members):
        raise ShardError(f"{val_labels} has {len(synsets):,} labels, {tar} has {len(members):,} images")
    labels = {synset: (synset,) for synset in classes}
    return Listing(
        columns=[Column(LABEL, "cls", classes)],
        samples=[
            Sample(sample_key(Path(m.name).stem), Reference(str(tar), m.name, m.offset, m.size), labels[synset])
            for m, synset in zip(members, synsets, strict=True)
        ],
    )


def read_val_labels(path: Path) -> tuple[list[str], list[str]]:
    """(the synset of each image, all classes sorted) from any of the forms that `list_val` takes."""
    if path.is_dir():
        return _read_ids(_find(path, _GROUND_TRUTH).read_text(), _find(path, _META), path)
    if tarfile.is_tarfile(path):
        try:
            with tarfile.open(path) as kit:
                return _read_ids(_extract(kit, _GROUND_TRUTH, path).read().decode(), _extract(kit, _META, path), path)
        except (tarfile.ReadError, EOFError, zlib.error) as error:
            raise ShardError(f"{path} is cut off or damaged ({error}): download it again") from error
    text = path.read_text()
    lines = text.split()
    if lines and all(_SYNSET.fullmatch(line) for line in lines):
        return lines, sorted(set(lines))
    if lines and all(line.isdecimal() for line in lines):
        meta = path.with_name(_META)
        if not meta.exists():
            raise ShardError(
                f"{path} holds the development kit's ids, and {meta} that says which synsets they are is missing: "
                "put it there, or give the whole kit (ILSVRC2012_devkit_t12.tar.gz)"
            )
        return _read_ids(text, meta, path)
    raise ShardError(f"{path} must hold one synset (as n01440764) or one of the development kit's ids a line")


def _read_ids(ground_truth: str, meta: Path | IO[bytes], path: Path) -> tuple[list[str], list[str]]:
    import scipy.io  # a quarter of a second that every worker process would pay

    try:
        table = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
        leaves = table[table["num_children"] == 0]
        synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    except (ValueError, KeyError, TypeError, IndexError, scipy.io.matlab.MatReadError) as error:
        raise ShardError(f"{path}: its meta.mat is not ImageNet-1k's ({error})") from error
    unknown = sorted({line for line in ground_truth.split() if not line.isdecimal() or int(line) not in synsets})
    if unknown:
        raise ShardError(f"{path}: ground truth {unknown[0]!r} is no id of a class in meta.mat")
    return [synsets[int(line)] for line in ground_truth.split()], sorted(synsets.values())


def _find(folder: Path, name: str) -> Path:
    found = sorted(folder.rglob(name))
    if not found:
        raise ShardError(f"{folder} has no {name} in it: give the unpacked development kit, or its tar.gz")
    return found[0]


def _extract(kit: tarfile.TarFile, name: str, path: Path) -> IO[bytes]:
    for member in kit:
        content = kit.extractfile(member) if Path(member.name).name == name else None
        if content:
            return content
    raise ShardError(f"{path} has no {name} in it: give ILSVRC2012_devkit_t12.tar.gz (tasks 1 and 2)")

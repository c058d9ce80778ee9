"""Source: ImageNet-1k's training and validation tars as distributed, without unpacking.

`ILSVRC2012_img_train.tar` contains one tar per class, named after its synset (e.g. n01440764).
`ILSVRC2012_img_val.tar` contains only images. Their classes are in the development kit, as ids that are *not* indices
into the sorted synsets.
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

from shards.errors import ShardError
from shards.format import Column
from shards.listing import LABEL, Labels, SampleList, TarMember, list_members, sample_key
from shards.samples import FileRef, Sample, SampleTable

_SYNSET = re.compile(r"n\d{8}")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_READS_AT_ONCE = 8


def list_train(tar: Path, labels: Labels) -> SampleList:
    """List the training tar. Classes are the sorted synsets; a key is the file's stem, e.g. `n01440764_10026`.

    With `none` there are no labels.
    """
    class_tars = list(list_members(tar))
    for class_tar in class_tars:
        if not (class_tar.name.endswith(".tar") and _SYNSET.fullmatch(Path(class_tar.name).stem)):
            raise ShardError(f"{tar} contains {class_tar.name}: the training tar has only tars named after synsets")
    columns = [Column(LABEL, "cls", sorted(Path(class_tar.name).stem for class_tar in class_tars))]
    listing = SampleList([] if labels == "none" else columns)
    # Each of the million headers is found only by reading the one before it: threads overlap the disk reads.
    with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        for samples in threads.map(partial(_list_class, tar, labels), class_tars):
            listing.samples.extend(samples)
    return listing


def _list_class(tar: Path, labels: Labels, class_tar: TarMember) -> list[Sample]:
    values = () if labels == "none" else (Path(class_tar.name).stem,)
    return [
        Sample(
            sample_key(os.path.splitext(member.name)[0]),
            FileRef(str(tar), f"{class_tar.name}/{member.name}", member.offset, member.size),
            values,
        )
        for member in list_members(tar, within=class_tar)
    ]


def list_val(tar: Path, val_labels: Path | None, labels: Labels) -> SampleList:
    """List the validation tar. The n-th label belongs to the n-th image in the order of the file names.

    `val_labels`: the development kit (`ILSVRC2012_devkit_t12.tar.gz` or the folder it unpacks to), its ground-truth
    file with `meta.mat` next to it, or a text file with one synset per line. Raise ShardError where it is missing
    (unless `labels` is `none`), is unusable, or has another number of labels.
    """
    if val_labels is None and labels != "none":
        raise ShardError(
            f"{tar} contains no labels: use --val-labels with ILSVRC2012_devkit_t12.tar.gz, "
            "or with a text file of one synset per line in the order of the file names, or use --labels none"
        )
    members = sorted(list_members(tar))
    columns: list[Column] = []
    values: list[tuple[str, ...]] = [()] * len(members)
    if val_labels is not None:
        synsets, classes = read_val_labels(val_labels)
        if len(synsets) != len(members):
            raise ShardError(
                f"{val_labels} has {len(synsets):,} labels, {tar} has {len(members):,} images; "
                "use the labels of this tar"
            )
        columns = [Column(LABEL, "cls", classes)]
        tuples = {synset: (synset,) for synset in classes}
        values = [tuples[synset] for synset in synsets]
    samples = (
        Sample(sample_key(Path(member.name).stem), FileRef(str(tar), member.name, member.offset, member.size), value)
        for member, value in zip(members, values, strict=True)
    )
    return SampleList(columns, SampleTable(samples))


def read_val_labels(path: Path) -> tuple[list[str], list[str]]:
    """Return (synset of each image, sorted classes) from any form of labels that `list_val` accepts."""
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
                f"{path} has the development kit's ids, but {meta}, which maps them to synsets, is missing: "
                "copy it there, or use the whole kit (ILSVRC2012_devkit_t12.tar.gz)"
            )
        return _read_ids(text, meta, path)
    raise ShardError(f"{path} must have one synset (e.g. n01440764) or one id of the development kit per line")


def _read_ids(ground_truth: str, meta: Path | IO[bytes], path: Path) -> tuple[list[str], list[str]]:
    import scipy.io  # 0.25 s that every worker process would spend

    try:
        table = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
        leaves = table[table["num_children"] == 0]
        synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    except (ValueError, KeyError, TypeError, IndexError, scipy.io.matlab.MatReadError) as error:
        raise ShardError(f"{path}: its meta.mat is not ImageNet-1k's ({error}); download the kit again") from error
    unknown = sorted({line for line in ground_truth.split() if not line.isdecimal() or int(line) not in synsets})
    if unknown:
        raise ShardError(f"{path}: ground truth {unknown[0]!r} is not a class id in meta.mat; download the kit again")
    return [synsets[int(line)] for line in ground_truth.split()], sorted(synsets.values())


def _find(folder: Path, name: str) -> Path:
    found = sorted(folder.rglob(name))
    if not found:
        raise ShardError(f"{folder} does not contain {name}: use the unpacked development kit, or its tar.gz")
    return found[0]


def _extract(kit: tarfile.TarFile, name: str, path: Path) -> IO[bytes]:
    for member in kit:
        content = kit.extractfile(member) if Path(member.name).name == name else None
        if content:
            return content
    raise ShardError(f"{path} does not contain {name}: use ILSVRC2012_devkit_t12.tar.gz (tasks 1 and 2)")

"""Small real sources for the shard tests: photographs, class folders, ImageNet's tars, the development kit."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from rich.console import Console

from shards.images import ImageRules
from shards.make import MakeShards, make_shards
from shards.manifest import Manifest
from shards.plan import Cut
from shards.sources import Companions

SYNSETS = ["n01440764", "n01443537", "n01484850"]
"""Sorted. The development kit below numbers them in another order, as the real one does."""


ROOT = Path(__file__).parents[2]


def photo(seed: int = 0, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """A colour image with the smoothness of a photograph, so that JPEG keeps it nearly."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, size: tuple[int, int] = (80, 60)) -> bytes:
    return encoded(photo(seed, size), quality=92)


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def class_folders(root: Path, classes: dict[str, int]) -> Path:
    """`classes` images per class name."""
    seed = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number:03d}.jpg").write_bytes(jpeg(seed))
            seed += 1
    return root


def imagenet_train_tar(path: Path, per_class: int = 3) -> Path:
    class_tars = {}
    for index, synset in reversed(list(enumerate(SYNSETS))):
        images = {f"{synset}_{number}.JPEG": jpeg(10 * index + number) for number in range(per_class)}
        class_tars[f"{synset}.tar"] = tar_of(images)
    path.write_bytes(tar_of(class_tars))
    return path


def imagenet_val_tar(path: Path, count: int = 6) -> Path:
    """In reverse order of the names: the labels go by name, not by place."""
    path.write_bytes(tar_of({f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(n) for n in range(count, 0, -1)}))
    return path


def development_kit(folder: Path, ids: list[int]) -> Path:
    """The kit's two files that matter. Its ids: 1 is the last synset, 2 the first, 3 the second; 4 is no leaf."""
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.zeros((4, 1), dtype=fields)
    for row, (number, synset, children) in enumerate(
        [(1, SYNSETS[2], 0), (2, SYNSETS[0], 0), (3, SYNSETS[1], 0), (4, "n00001740", 3)]
    ):
        synsets[row, 0] = (number, synset, f"words of {synset}", children)
    scipy.io.savemat(data / "meta.mat", {"synsets": synsets})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{i}\n" for i in ids))
    return folder / "ILSVRC2012_devkit_t12"


def make(src: Path | str, out: Path, split: str = "train", **options: object) -> Manifest:
    """make_shards in this process, in shards of a few samples."""

    def taken(kind: type) -> dict[str, object]:
        return {each.name: options.pop(each.name) for each in fields(kind) if each.name in options}

    rules, beside = ImageRules(**taken(ImageRules)), Companions(**taken(Companions))
    cut = Cut(min_shards=options.pop("min_shards", 2))
    options = {"workers": 1, **options}
    return make_shards(
        MakeShards(str(src), out, split, rules=rules, cut=cut, beside=beside, **options), Console(quiet=True)
    )


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a shard folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def samples(out: Path, manifest: Manifest) -> dict[str, dict[str, bytes]]:
    """Key → component → content over all shards of a split."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in manifest.shards:
        for name, data in read_tar(out / shard.name).items():
            key, _, component = name.partition(".")
            found.setdefault(key, {})[component] = data
    return found


def run_tool(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, **options)

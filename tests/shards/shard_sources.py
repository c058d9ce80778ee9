"""Small sources for the shard tests: images, class folders, ImageNet's tars, the development kit."""

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

from shards.format import Manifest
from shards.images import ImageOptions
from shards.make import ShardingOptions, make_shards
from shards.plan import ShardSize
from shards.sources.detect import SourceOptions

SYNSETS = ["n01440764", "n01443537", "n01484850"]
"""Synsets, sorted. The development kit below numbers them in another order, like the real one."""


ROOT = Path(__file__).parents[2]


def photo(seed: int = 0, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """Return a smooth colour image, which JPEG compression changes little."""
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


def slow_images(folder: Path) -> Path:
    """Make 36 images that take some milliseconds each, and a damaged one, in the class folder `folder`/class."""
    images = folder / "class"
    images.mkdir(parents=True)
    for number in range(36):
        (images / f"{number:02d}.png").write_bytes(encoded(photo(number, (560, 420)), "PNG", compress_level=1))
    (images / "bad.png").write_bytes(b"bad")
    return folder


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def class_folders(root: Path, classes: dict[str, int]) -> Path:
    """Write class folders with `classes[name]` images each."""
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
    """Write a validation tar in reverse order of the names: labels follow the names, not the order."""
    path.write_bytes(tar_of({f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(n) for n in range(count, 0, -1)}))
    return path


def development_kit(folder: Path, ids: list[int]) -> Path:
    """Write the kit's two relevant files. Ids: 1 is the last synset, 2 the first, 3 the second; 4 is not a leaf."""
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
    """Run make_shards in this process, with shards of a few samples; return the manifest of `split`."""

    def taken(kind: type) -> dict[str, object]:
        return {item.name: options.pop(item.name) for item in fields(kind) if item.name in options}

    rules, extra = ImageOptions(**taken(ImageOptions)), SourceOptions(**taken(SourceOptions))
    cut = ShardSize(min_shards=options.pop("min_shards", 2))
    options = {"workers": 1, **options}
    manifests = make_shards(
        ShardingOptions(str(src), out, split, image=rules, shard=cut, extra=extra, **options), Console(quiet=True)
    )
    return manifests[split]


def contents(out: Path) -> dict[str, bytes]:
    """Return the content of every file in a shard folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def samples(out: Path, manifest: Manifest) -> dict[str, dict[str, bytes]]:
    """Return key → component → content over all shards of a split."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in manifest.shards:
        for name, data in read_tar(out / shard.name).items():
            key, _, component = name.partition(".")
            found.setdefault(key, {})[component] = data
    return found


def run_tool(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process, as a user does."""
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, **options)

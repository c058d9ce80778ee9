"""Shards for the pipeline tests: real tars with indices and a manifest in the documented format."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from shards.format import Column, Entry, Manifest, Shard, format_index, save_manifest

CLASSES = [f"class{i}" for i in range(12)]


def write_split(
    folder: Path, split: str, images: Sequence[bytes], per_shard: Sequence[int], masks: Sequence[bytes] | None = None
) -> Manifest:
    """Write a split. Sample i has key f"{split}{i:06d}", class i % 12, and i in the label column `row`."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, start = [], 0
    for number, count in enumerate(per_shard):
        tar = folder / f"{split}-{number:06d}.tar"
        index = tar.with_suffix(".idx")
        index.write_bytes(format_index(_write_tar(tar, split, images, range(start, start + count), masks)))
        start += count
        shards.append(
            Shard(tar.name, count, tar.stat().st_size, _hash(tar), index.name, index.stat().st_size, _hash(index))
        )
    assert start == len(images)
    manifest = Manifest(
        split=split,
        seed=0,
        samples=start,
        bytes=sum(shard.bytes for shard in shards),
        read=start,
        rejected=0,
        columns=[Column("class", "cls", CLASSES), Column("row", "row.cls", [str(i) for i in range(start)])],
        masks=masks is not None,
        settings={},
        shards=shards,
    )
    save_manifest(folder, manifest)
    return manifest


def _write_tar(
    path: Path, split: str, images: Sequence[bytes], rows: range, masks: Sequence[bytes] | None
) -> list[list[Entry]]:
    samples = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            entries = []
            components = {"jpg": images[row], "cls": str(row % len(CLASSES)).encode(), "row.cls": str(row).encode()}
            if masks is not None:
                components["mask.png"] = masks[row]
            for component, content in components.items():
                member = tarfile.TarInfo(f"{split}{row:06d}.{component}")
                member.size = len(content)
                entries.append(Entry(component, tar.offset + tarfile.BLOCKSIZE, len(content), member.name))
                tar.addfile(member, io.BytesIO(content))
            samples.append(entries)
    return samples


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def jpeg(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels as a baseline JPEG of quality 95."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def png(ids: np.ndarray) -> bytes:
    """Encode uint8 ids [h, w] as an 8-bit grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray(ids).save(buffer, "PNG")
    return buffer.getvalue()


def photographs_and_noise(count: int, side: int = 160) -> list[bytes]:
    """Make JPEGs of sides around `side`: half are crops of photographs (astronaut, cat, coffee), half random pixels."""
    rng = np.random.default_rng(0)
    photographs = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    images = []
    for i in range(count):
        height, width = (int(n) for n in rng.integers(3 * side // 4, 5 * side // 4, 2))
        if i % 2:
            images.append(jpeg(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
        else:
            photograph = photographs[i // 2 % 3]
            top, left = rng.integers(0, photograph.shape[0] - height), rng.integers(0, photograph.shape[1] - width)
            images.append(jpeg(np.ascontiguousarray(photograph[top : top + height, left : left + width])))
    return images

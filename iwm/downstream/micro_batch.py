"""Micro-batch: as many images in one pass as the device's memory holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from iwm.config import ConfigError
from iwm.downstream import memory
from iwm.downstream.bench import Bench
from iwm.downstream.classification import Column
from iwm.downstream.example import Example
from iwm.downstream.memory import Need
from iwm.downstream.study import Study
from shards.manifest import load_manifest

USED = 0.8
"""Share of the free memory that is planned with. The rest is left for the pipeline's decoders, workspaces of kernels,
other peaks (held-out images) and fragmentation."""
STATE = 12
"""Bytes per trained parameter that are allocated later: its gradient and two moments, in float32."""
MIB, GIB = 2**20, 2**30


def fit(bench: Bench, study: Study, example: Example, kept: Sequence[Column] = ()) -> tuple[Bench, str]:
    """Choose the micro-batch where --micro-batch is None; return the bench with it, and a line that says why.

    On a GPU: the largest divisor of a process's share that fits, even where the share is (images are mixed in pairs),
    the same on all processes. On a CPU: the whole share. A training that goes on keeps the micro-batch that it began
    with, on as many processes and a device of the same type. kept: columns whose features stay on the device. Raises
    ConfigError where not even the smallest divisor fits.
    """
    whole, here = bench.micro_batch, bench.here
    if bench.settings.micro_batch is not None:
        return bench, f"--micro-batch {whole} of {whole * bench.accumulation} images of a process, as asked for"
    began = _began_with(bench)
    if began is not None:
        return _with(bench, began), f"--micro-batch {began} of {whole}: as this training began"
    free = memory.free_memory(here.device)
    if free is None:
        return bench, f"--micro-batch {whole} of {whole}: on a CPU, a process's whole share in one pass"
    bf16 = bench.pretrained.bf16
    needs = [
        memory.need_of(study, arm, example, share=whole, bf16=bf16, kept=bool(kept)) for arm in range(len(study.names))
    ]
    later = STATE * sum(p.numel() for p in study.arms.parameters() if p.requires_grad)
    if kept:
        later += _images(bench, kept) * memory.feature_bytes(study, example, bf16=bf16)
    left = int(USED * free) - later
    images = min(here.gather(largest_fitting(whole, needs, left)))
    largest = max(needs, key=lambda need: need.of(whole))
    said = f"the largest arm needs {largest.image / MIB:,.0f} MiB an image"
    room = f"of {free / GIB:,.1f} GiB that are free, {max(0, left) / GIB:,.1f} GiB are for a pass"
    if not images:
        raise ConfigError(f"--micro-batch: none fits: {said}, and {room}; {_remedy(bench)}")
    return _with(bench, images), f"--micro-batch {images} of {whole}: {said}, and {room}"


def largest_fitting(share: int, needs: Sequence[Need], left: int) -> int:
    """Return the largest divisor of `share`, even if that is, that all arms' passes fit with; 0 where none does.

    left: bytes for a pass.
    """
    divisors = (each for each in range(share, 0, -1) if share % each == 0 and each % 2 == share % 2)
    return next((each for each in divisors if max(need.of(each) for need in needs) <= left), 0)


def too_large(bench: Bench) -> ConfigError:
    """Return the error of a device that ran out of memory."""
    return ConfigError(
        f"--micro-batch {bench.micro_batch}: a pass of so many images is more than the device can hold; "
        f"lower it, or {_remedy(bench)}"
    )


def split_of(bench: Bench) -> dict[str, Any]:
    """Return what last.pt says of the micro-batch, for a training that goes on."""
    return {"micro_batch": bench.micro_batch, "processes": bench.here.size, "device": bench.here.device.type}


def _began_with(bench: Bench) -> int | None:
    """Return the micro-batch that was chosen when the training began, if it holds here."""
    last, whole = bench.last, split_of(bench)
    if last is None or last["identity"]["micro_batch"] is not None:
        return None
    # A last.pt without it is older: then None was the whole share.
    split = last.get("split", whole | {"processes": len(last["ranks"])})
    images: int = split["micro_batch"]
    same = all(split[name] == whole[name] for name in ("processes", "device"))
    return images if same and bench.micro_batch % images == 0 else None


def _with(bench: Bench, images: int) -> Bench:
    return replace(bench, micro_batch=images, accumulation=bench.micro_batch * bench.accumulation // images)


def _images(bench: Bench, columns: Sequence[Column]) -> int:
    """Return how many images' features a process keeps."""
    splits = ((column.shards, split) for column in columns for split in (column.train, column.val))
    return sum(-(-load_manifest(shards, split).samples // bench.here.size) for shards, split in splits)


def _remedy(bench: Bench) -> str:
    # Probes, which have no such option, keep nothing of the blocks.
    if getattr(bench.settings, "activation_checkpointing", True):
        return "train fewer arms at once, or use a GPU with more memory"
    return "say --activation-checkpointing, which keeps less"

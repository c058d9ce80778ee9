"""Micro-batch size: the images of one pass, as many as fit into the device's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from iwm.config import ConfigError
from iwm.downstream import cost
from iwm.downstream.context import RunContext
from iwm.downstream.cost import MakeDummyBatch, MemoryNeed
from iwm.downstream.study import Study
from iwm.downstream.tasks import LabelColumn
from shards.format import load_manifest

MEMORY_FRACTION = 0.8
"""Share of the free memory that passes may use. The rest is for the pipeline's decoders, workspaces of kernels, other
peaks (held-out images) and fragmentation."""
STATE_BYTES = 12
"""Bytes per trained parameter that are allocated later: its gradient and two moments, in float32."""
MIB, GIB = 2**20, 2**30


def choose_micro_batch(
    context: RunContext, study: Study, example: MakeDummyBatch, cached: Sequence[LabelColumn] = ()
) -> tuple[RunContext, str]:
    """Choose the micro-batch size where --micro-batch-size is None; return the context with it, and a message.

    On a GPU: the largest divisor of a process's share that fits, the same on all processes; it is even where the share
    is even, because images are mixed in pairs. On a CPU: the whole share. A resumed training has the micro-batch size
    that it started with if the number of processes and the device type are the same. cached: columns whose features are
    cached on the device. Raises ConfigError where not even the smallest divisor fits.
    """
    whole, dist = context.micro_batch, context.dist
    if context.settings.micro_batch_size is not None:
        return (
            context,
            f"--micro-batch-size {whole} of {whole * context.accumulation} images of a process, as given",
        )
    initial = _initial_size(context)
    if initial is not None:
        return _with(context, initial), f"--micro-batch-size {initial} of {whole}: as at the start of this training"
    free = cost.free_memory(dist.device)
    if free is None:
        return context, f"--micro-batch-size {whole} of {whole}: on a CPU, a process's whole share in one pass"
    bf16 = context.pretrained.bf16
    needs = [
        cost.memory_need(study, trial, example, share=whole, bf16=bf16, cached=bool(cached))
        for trial in range(len(study.names))
    ]
    later = STATE_BYTES * sum(p.numel() for p in study.trials.parameters() if p.requires_grad)
    if cached:
        later += _images(context, cached) * cost.feature_bytes(study, example, bf16=bf16)
    left = int(MEMORY_FRACTION * free) - later
    images = min(dist.all_gather(largest_fitting(whole, needs, left)))
    largest = max(needs, key=lambda need: need.of(whole))
    need = f"the largest trial needs {largest.image / MIB:,.0f} MiB per image"
    available = f"a pass may use {max(0, left) / GIB:,.1f} of {free / GIB:,.1f} GiB of free memory"
    if not images:
        raise ConfigError(f"--micro-batch-size: no size fits: {need}, and {available}; {_remedy(context)}")
    return _with(context, images), f"--micro-batch-size {images} of {whole}: {need}, and {available}"


def largest_fitting(share: int, needs: Sequence[MemoryNeed], left: int) -> int:
    """Return the largest divisor of `share` with which every trial's pass fits; 0 where there is none.

    The divisor is even where `share` is even. left: bytes for a pass.
    """
    divisors = (count for count in range(share, 0, -1) if share % count == 0 and count % 2 == share % 2)
    return next((count for count in divisors if max(need.of(count) for need in needs) <= left), 0)


def out_of_memory_error(context: RunContext) -> ConfigError:
    """Return the error of a device that ran out of memory."""
    return ConfigError(
        f"--micro-batch-size {context.micro_batch}: a pass of this size does not fit into the device's memory; "
        f"lower it, or {_remedy(context)}"
    )


def micro_batch_state(context: RunContext) -> dict[str, Any]:
    """Return the entry of last.pt from which a resumed training takes its micro-batch size."""
    return {"micro_batch_size": context.micro_batch, "processes": context.dist.size, "device": context.dist.device.type}


def _initial_size(context: RunContext) -> int | None:
    """Return the micro-batch size that was chosen at the start of the training, if it is valid here."""
    last, whole = context.last, micro_batch_state(context)
    if last is None or last["identity"]["micro_batch_size"] is not None:
        return None
    saved = last["micro_batch_state"]
    images: int = saved["micro_batch_size"]
    same = all(saved[name] == whole[name] for name in ("processes", "device"))
    return images if same and context.micro_batch % images == 0 else None


def _with(context: RunContext, images: int) -> RunContext:
    return replace(context, micro_batch=images, accumulation=context.micro_batch * context.accumulation // images)


def _images(context: RunContext, columns: Sequence[LabelColumn]) -> int:
    """Return the number of images whose features a process caches."""
    splits = ((column.shards, split) for column in columns for split in (column.train, column.val))
    return sum(-(-load_manifest(shards, split).samples // context.dist.size) for shards, split in splits)


def _remedy(context: RunContext) -> str:
    # Probes do not have this option, because they store no activations of blocks.
    if getattr(context.settings, "activation_checkpointing", True):
        return "train fewer trials at once, or use a GPU with more memory"
    return "use --activation-checkpointing, which stores fewer activations"

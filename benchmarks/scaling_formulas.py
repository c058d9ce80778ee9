"""What many GPUs cost and bring, predicted: pure functions of sizes and speeds. Nothing here was measured on a GPU.

Times are seconds, sizes bytes, speeds bytes per second. Sources of the constants stand beside them; docs/scaling.md
has the reasoning and the tables that scaling_model.py makes of these functions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

GPUS_PER_NODE = 8
NVLINK = 370e9
"""What NCCL reaches on NVLink 4, whose line rate is 450 GB/s per direction (NVIDIA/nccl-tests, issue 212)."""
NETWORK = GPUS_PER_NODE * 46e9
"""Of a node: one 400 Gb/s adapter per GPU, 46 to 48 GB/s of each expected (NVIDIA/nccl-tests, issue 290)."""
TREE_SHARE = 0.9
"""Of the ring's bandwidth (NCCL, src/graph/tuning.cc, as the latencies below; protocol Simple)."""
RING_START, RING_NVLINK, RING_NETWORK, RING_PLATEAU = 8.4e-6, 3.4e-6, 9.6e-6, 1.9
TREE_NVLINK, TREE_NETWORK = 28e-6, 50e-6
BUCKET = 25 * 2**20
"""Bytes that DDP reduces at once (its bucket_cap_mb)."""
TAKEN = 16 / 132
"""Share of the GPU that an exchange takes from what it overlaps: 16 of an H100's 132 multiprocessors. Assumed."""
MEMORY = 0.8 * 3.35e12
"""An H100's memory (3.35 TB/s, its data sheet), at an assumed four fifths."""
REFERENCE_BATCH = 256
"""Images on a GPU at which a rate is assumed."""


class Work(NamedTuple):
    """A model in training on one GPU."""

    trained: int
    """Parameters of context encoder and predictor."""
    target: int
    """Parameters of the target encoder."""
    rate: float
    """Images per second at REFERENCE_BATCH, alone. Assumed."""
    backward: float
    """Share of the step's FLOPs in which gradients come into being."""


class Prediction(NamedTuple):
    """One step with an all-reduce."""

    alone: float
    """The step without it."""
    exchange: float
    """The all-reduce without the step."""
    shown: float
    """What of the all-reduce is left over when backward has ended."""

    @property
    def efficiency(self) -> float:
        """Images per second and GPU, over those of one GPU with the same batch."""
        return self.alone / (self.alone + self.shown + TAKEN * (self.exchange - self.shown))


def parameters(module: nn.Module, trained: bool) -> int:
    """Elements of the parameters that are trained, or of those that are not."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad is trained)


def gradient_bytes(trained: int) -> int:
    """What a step all-reduces: float32, whatever the precision of the step."""
    return 4 * trained


def checkpoint_bytes(trained: int, target: int) -> int:
    """Parameters, target encoder and AdamW's two moments, float32."""
    return 4 * (trained + target) + 8 * trained


def state_bytes(trained: int, target: int, shards: int = 1) -> float:
    """On each GPU, activations aside: parameters, gradients, moments and target encoder, float32, over `shards` GPUs
    (FSDP2; 1: DDP)."""
    return (16 * trained + 4 * target) / shards


def all_reduce_traffic(size: int, gpus: int) -> float:
    """What each GPU sends, and as much again receives, whatever the algorithm: 2·(n − 1)/n of the size."""
    return 2 * (gpus - 1) / gpus * size


def nodes(gpus: int) -> int:
    return math.ceil(gpus / GPUS_PER_NODE)


def bandwidth(gpus: int) -> float:
    """Of a ring through all GPUs. Between nodes all adapters carry a ring each, so theirs add up."""
    return NVLINK if nodes(gpus) == 1 else min(NVLINK, NETWORK)


def ring(size: int, gpus: int) -> float:
    """All-reduce of one buffer along a ring: latency grows with the number of GPUs."""
    between = 2 * (nodes(gpus) - 1)
    latency = RING_START + (2 * (gpus - 1) - between) * RING_NVLINK + between * RING_NETWORK
    return latency * (RING_PLATEAU if between else 1) + all_reduce_traffic(size, gpus) / bandwidth(gpus)


def tree(size: int, gpus: int) -> float:
    """All-reduce of one buffer along trees: latency grows with the logarithm of the number of nodes."""
    latency = 2 * ((min(gpus, GPUS_PER_NODE) - 1) * TREE_NVLINK + math.log2(nodes(gpus)) * TREE_NETWORK)
    return latency + 2 * size / (TREE_SHARE * bandwidth(gpus))


def all_reduce(size: int, gpus: int) -> float:
    """By the faster of the two, as NCCL chooses."""
    return 0.0 if gpus == 1 else min(ring(size, gpus), tree(size, gpus))


def update_seconds(trained: int, target: int) -> float:
    """Optimiser and EMA, limited by memory: AdamW reads four numbers per parameter and writes three, the EMA reads two
    and writes one. The same at any batch."""
    return 4 * (7 * trained + 3 * target) / MEMORY


def step_alone(work: Work, images: int) -> float:
    """A step of `images` on one GPU: forward and backward in proportion, the update on top."""
    update = update_seconds(work.trained, work.target)
    return images * (1 / work.rate - update / REFERENCE_BATCH) + update


def predict(work: Work, gpus: int, images: int) -> Prediction:
    """A step of `images` on each GPU. Buckets are filled evenly over the backward pass and reduced one after another,
    the last when it has ended."""
    alone = step_alone(work, images)
    if gpus == 1:
        return Prediction(alone, 0.0, 0.0)
    size = gradient_bytes(work.trained)
    buckets = math.ceil(size / BUCKET)
    each = all_reduce(size // buckets, gpus)
    backward = work.backward * (alone - update_seconds(work.trained, work.target))
    shown = max(each, buckets * each - backward * (1 - 1 / buckets))
    return Prediction(alone, buckets * each, shown)

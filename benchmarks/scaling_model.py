"""Analytical model of multi-GPU scaling; prints the tables of docs/scaling.md.

python benchmarks/scaling_model.py

Parameters are counted on the recipes' models, and FLOPs come from iwm/models/flops.py. All times are predicted by pure
functions of sizes and speeds; nothing here was measured on a GPU. Times are in seconds, sizes in bytes, speeds in bytes
per second. Each constant names its source; docs/scaling.md explains the model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from scaling_tables import IMAGENET_BYTES, RESIZED_BYTES, table
from torch import nn

from iwm.config import Config
from iwm.models.flops import training_flops
from iwm.models.world_model import WorldModel
from iwm.recipes import RECIPES

GPUS_PER_NODE = 8
NVLINK = 370e9
"""NCCL's bandwidth on NVLink 4, whose line rate is 450 GB/s per direction (NVIDIA/nccl-tests, issue 212)."""
NETWORK = GPUS_PER_NODE * 46e9
"""Network bandwidth of a node: one 400 Gb/s adapter per GPU, 46 to 48 GB/s each (NVIDIA/nccl-tests, issue 290)."""
TREE_SHARE = 0.9
"""Bandwidth of a tree relative to a ring (NCCL, src/graph/tuning.cc, like the latencies below; protocol Simple)."""
RING_START, RING_NVLINK, RING_NETWORK, RING_PLATEAU = 8.4e-6, 3.4e-6, 9.6e-6, 1.9
TREE_NVLINK, TREE_NETWORK = 28e-6, 50e-6
BUCKET = 25 * 2**20
"""Size of a DDP bucket (bytes; bucket_cap_mb)."""
TAKEN = 16 / 132
"""Share of the GPU that an all-reduce takes from overlapped work: 16 of an H100's 132 multiprocessors. Assumed."""
MEMORY = 0.8 * 3.35e12
"""Memory bandwidth of an H100: an assumed 80% of the data sheet's 3.35 TB/s."""
REFERENCE_BATCH = 256
"""Batch size per GPU for which a rate is assumed (images)."""


class ModelWork(NamedTuple):
    """Size and speed of a model in training on one GPU."""

    trained: int
    """Number of parameters of context encoder and predictor."""
    target: int
    """Number of parameters of the target encoder."""
    rate: float
    """Images per second at REFERENCE_BATCH on one GPU. Assumed."""
    backward: float
    """Share of the step's FLOPs in the backward pass."""


class Prediction(NamedTuple):
    """Predicted times of one step with an all-reduce (seconds)."""

    alone: float
    """Time of the step without the all-reduce."""
    exchange: float
    """Time of the all-reduce without the step."""
    exposed: float
    """Time of the all-reduce after the end of the backward pass."""

    @property
    def efficiency(self) -> float:
        """Images per second per GPU, relative to one GPU with the same batch size."""
        return self.alone / (self.alone + self.exposed + TAKEN * (self.exchange - self.exposed))


def parameters(module: nn.Module, trained: bool) -> int:
    """Return the number of trained parameters, or of those that are not trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad is trained)


def gradient_bytes(trained: int) -> int:
    """Return the bytes that a step all-reduces: float32 in any precision of the step."""
    return 4 * trained


def checkpoint_bytes(trained: int, target: int) -> int:
    """Return the bytes of parameters, target encoder and AdamW's two moments in float32."""
    return 4 * (trained + target) + 8 * trained


def state_bytes(trained: int, target: int, shards: int = 1) -> float:
    """Return the bytes of parameters, gradients, moments and target encoder on each GPU, in float32.

    shards: number of GPUs that share them (FSDP2); 1: DDP. Activations are not included.
    """
    return (16 * trained + 4 * target) / shards


def all_reduce_traffic(size: int, gpus: int) -> float:
    """Return the bytes that each GPU sends, and also receives, with any algorithm: 2·(n − 1)/n of the size."""
    return 2 * (gpus - 1) / gpus * size


def nodes(gpus: int) -> int:
    return math.ceil(gpus / GPUS_PER_NODE)


def bandwidth(gpus: int) -> float:
    """Return the bandwidth of a ring through all GPUs. Between nodes each adapter carries a ring, so they add up."""
    return NVLINK if nodes(gpus) == 1 else min(NVLINK, NETWORK)


def ring(size: int, gpus: int) -> float:
    """Return the time of a ring all-reduce of one buffer, whose latency grows with the number of GPUs."""
    between = 2 * (nodes(gpus) - 1)
    latency = RING_START + (2 * (gpus - 1) - between) * RING_NVLINK + between * RING_NETWORK
    return latency * (RING_PLATEAU if between else 1) + all_reduce_traffic(size, gpus) / bandwidth(gpus)


def tree(size: int, gpus: int) -> float:
    """Return the time of a tree all-reduce of one buffer, whose latency grows with the logarithm of the nodes."""
    latency = 2 * ((min(gpus, GPUS_PER_NODE) - 1) * TREE_NVLINK + math.log2(nodes(gpus)) * TREE_NETWORK)
    return latency + 2 * size / (TREE_SHARE * bandwidth(gpus))


def all_reduce(size: int, gpus: int) -> float:
    """Return the time of the faster of ring and tree, as NCCL chooses."""
    return 0.0 if gpus == 1 else min(ring(size, gpus), tree(size, gpus))


def update_seconds(trained: int, target: int) -> float:
    """Return the time of optimiser and EMA, which is bound by memory bandwidth and independent of the batch size.

    AdamW reads four numbers per parameter and writes three; the EMA reads two and writes one.
    """
    return 4 * (7 * trained + 3 * target) / MEMORY


def step_alone(work: ModelWork, images: int) -> float:
    """Return the time of a step of `images` on one GPU: proportional forward and backward passes, and the update."""
    update = update_seconds(work.trained, work.target)
    return images * (1 / work.rate - update / REFERENCE_BATCH) + update


def predict(work: ModelWork, gpus: int, images: int) -> Prediction:
    """Predict a step of `images` on each GPU.

    Buckets become ready at even intervals during the backward pass and are reduced one after another; the last is
    reduced after its end.
    """
    alone = step_alone(work, images)
    if gpus == 1:
        return Prediction(alone, 0.0, 0.0)
    size = gradient_bytes(work.trained)
    buckets = math.ceil(size / BUCKET)
    per_bucket = all_reduce(size // buckets, gpus)
    backward = work.backward * (alone - update_seconds(work.trained, work.target))
    exposed = max(per_bucket, buckets * per_bucket - backward * (1 - 1 / buckets))
    return Prediction(alone, buckets * per_bucket, exposed)


GPUS = (8, 16, 64, 128, 512)
Target = Literal["minimum", "goal"]
TARGETS: dict[str, dict[Target, float]] = {
    "iwm_b16_equi_18x384": {"minimum": 2400.0, "goal": 3000.0},
    "iwm_l16_equi_36x512": {"minimum": 770.0, "goal": 900.0},
}
"""Target rates of one H100 on resident batches (images per second). These are targets, not measurements."""
PAPER_BATCH = Config().data.global_batch_size
IMAGES_PER_CORE = 500
"""Images per second and core, two views of 224 px, rounded from benchmarks/results/data-cpu.json."""


def model(recipe: str) -> WorldModel:
    """Return a recipe's model on the meta device, without memory for its parameters."""
    return meta_model(RECIPES[recipe]())


def meta_model(config: Config) -> WorldModel:
    with torch.device("meta"):
        return WorldModel(config)


def vit_g14() -> Config:
    """Return the configuration of the largest recipe with the encoder of timm's vit_giant_patch14: ViT-g/14."""
    base = RECIPES["iwm_l16_equi_36x512"]()
    giant = replace(base.encoder, embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11, patch_size=14)
    return replace(base, encoder=giant)


def work(recipe: str, target: Target) -> ModelWork:
    """Return size and speed of a recipe on a GPU that reaches its target."""
    built, flops = model(recipe), training_flops(RECIPES[recipe]())
    # Two thirds of the trained parts' FLOPs are backward; the target encoder has no backward pass.
    backward = 2 / 3 * (flops.context_encoder + flops.predictor) / flops.total
    return ModelWork(parameters(built, True), parameters(built, False), TARGETS[recipe][target], backward)


def sizes() -> str:
    """Return the table of parameters and bytes of every recipe of ViT-S/16 and larger with a network of its own."""
    left_out = ("demo", "cpu_small", "extended", "geometric")
    rows = []
    for recipe in (name for name in RECIPES if name not in left_out):
        built = model(recipe)
        trained, target = parameters(built, True), parameters(built, False)
        encoder = parameters(built.encoder, True)
        rows.append(
            [
                f"`{recipe}`",
                f"{encoder / 1e6:.1f} + {(trained - encoder) / 1e6:.1f}",
                f"{gradient_bytes(trained) / 2**20:,.0f}",
                f"{checkpoint_bytes(trained, target) / 1e9:.2f}",
                f"{state_bytes(trained, target) / 1e9:.1f}",
                f"{state_bytes(trained, target, GPUS_PER_NODE) / 1e9:.1f}",
            ]
        )
    heads = ["recipe", "encoder + predictor, M", "gradients, MiB", "checkpoint, GB"]
    return table([*heads, "state per GPU, DDP, GB", f"FSDP2 over {GPUS_PER_NODE}, GB"], rows)


def host_memory() -> str:
    """Return the table of state and of checkpoints' copies in host memory, on the GPUs of one node."""
    b16, l16 = (RECIPES[recipe]() for recipe in TARGETS)
    rows = []
    for name, config in {"ViT-B/16, 18×384": b16, "ViT-L/16, 36×512": l16, "ViT-g/14, 36×512": vit_g14()}.items():
        built = meta_model(config)
        trained, target = parameters(built, True), parameters(built, False)
        whole = checkpoint_bytes(trained, target)
        shard = whole / GPUS_PER_NODE
        state = [state_bytes(trained, target, shards) for shards in (1, GPUS_PER_NODE)]
        sizes = [f"{size / 1e9:.1f}" for size in (*state, whole, shard, whole + shard)]
        rows.append([name, f"{trained / 1e6:,.0f} + {target / 1e6:,.0f}", *sizes])
    heads = ["model", "trained + target, M", "state per GPU, DDP, GB", f"FSDP2 over {GPUS_PER_NODE}, GB"]
    copies = ["copy on rank 0, DDP, GB", "copy on each rank, FSDP2, GB", "rank 0 while writing, FSDP2, GB"]
    return table(heads + copies, rows)


def efficiency(each: int | None) -> str:
    """Return the table of predicted efficiency by number of GPUs.

    each: batch size per GPU; None: the paper's global batch size divided by the number of GPUs.
    """
    rows = []
    for recipe, targets in TARGETS.items():
        works = [work(recipe, target) for target in targets]
        for gpus in GPUS:
            images = each or PAPER_BATCH // gpus
            predicted = [predict(one, gpus, images) for one in works]
            row = [f"`{recipe}`", f"{gpus}", f"{images}", f"{1e3 * predicted[0].exchange:.1f}"]
            for p in predicted:
                row += [f"{1e3 * p.alone:.1f}", f"{1e3 * p.exposed:.1f}", f"{p.efficiency:.2f}"]
            rows.append(row)
    heads = [
        f"{target}: {what}" for target in ("minimum", "goal") for what in ("step, ms", "exposed, ms", "efficiency")
    ]
    return table(["recipe", "GPUs", "images each", "all-reduce, ms", *heads], rows)


def inputs() -> str:
    """Return the table of the input rate that a node needs where each GPU reaches its target."""
    rows = []
    for recipe, targets in TARGETS.items():
        for target, rate in targets.items():
            images = GPUS_PER_NODE * rate
            rows.append(
                [
                    f"`{recipe}`, {target}",
                    f"{images:,.0f}",
                    f"{images * IMAGENET_BYTES / 1e9:.2f}",
                    f"{images * RESIZED_BYTES / 1e9:.2f}",
                    f"{rate / IMAGES_PER_CORE:.1f}",
                ]
            )
    heads = ["target", f"images/s, {GPUS_PER_NODE} GPUs", "ImageNet as it is, GB/s", "--resize 320, GB/s"]
    return table([*heads, "cores per GPU, if a CPU made the views"], rows)


TABLES = {
    "Sizes": sizes,
    "Checkpoints": host_memory,
    f"Predicted, {REFERENCE_BATCH} images on each GPU": lambda: efficiency(REFERENCE_BATCH),
    f"Predicted, {PAPER_BATCH} images in all": lambda: efficiency(None),
    "Input": inputs,
}


if __name__ == "__main__":
    for title, make in TABLES.items():
        print(f"{title}\n\n{make()}\n")

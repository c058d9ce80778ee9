"""A few training steps on one resident batch: in this process, or as one of several under torchrun.

torchrun --nproc_per_node N tests/training/trajectory.py OUT ACCUMULATION PARALLEL
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from dali_pipelines.augmentation import PARAMS
from dali_pipelines.loader import Batch
from dali_pipelines.outputs import SampleKeys
from iwm.config import Optim, Train
from iwm.models.world_model import WorldModel
from iwm.training.distributed import World, world
from iwm.training.optim import build_optimizer
from iwm.training.parallel import whole, wrap
from iwm.training.schedules import Values
from iwm.training.step import Gradient, masks_for, train_step
from tests.training.runs import tiny_config

BATCH, STEPS = 8, 4
FP32 = Train(precision="fp32", compile=False)


def batch_of(first: int, size: int, step: int) -> Batch:
    """Samples first … first + size of the step's batch."""
    generator = torch.Generator().manual_seed(step)
    views = torch.randint(0, 256, (2, BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
    params = torch.rand(BATCH, len(PARAMS), generator=generator) + 0.5
    part = slice(first, first + size)
    return Batch(
        views[0, part], views[1, part], params[part], None, SampleKeys(torch.zeros(size, 1, dtype=torch.uint8))
    )


def trajectory(here: World, accumulation: int = 1, train: Train = FP32) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Parameters after STEPS steps, and each step's loss over all processes."""
    config = replace(tiny_config(Path("unused"), STEPS), train=train, optim=Optim(clip=0.5))
    torch.manual_seed(0)
    model = WorldModel(config).prepare(here.device, compiled=train.compile)
    gradient = Gradient(model, wrap(model, here, accumulation))
    optimizer, _ = build_optimizer(model, config.optim, here.device)
    size = BATCH // here.size // accumulation
    losses = []
    for step in range(STEPS):
        parts = range(accumulation)
        batches = [batch_of((part * here.size + here.rank) * size, size, step) for part in parts]
        masks = [masks_for(config, here, step, part, size) for part in parts]
        values = Values(lr=1e-2, weight_decay=0.1, ema=0.9)
        result = train_step(model, gradient, optimizer, batches, masks, values)
        losses.append(here.mean(result.loss.clone()).item())
    return {name: whole(value) for name, value in model.state_dict().items()}, losses


if __name__ == "__main__":
    with world(Train(device="cpu")) as here:
        state, losses = trajectory(here, int(sys.argv[2]), replace(FP32, parallel=sys.argv[3]))
        if here.main:
            torch.save({"state": state, "losses": losses}, sys.argv[1])

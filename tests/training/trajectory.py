"""A few training steps on one in-memory batch, in this process or as one of several under torchrun.

torchrun --nproc_per_node N tests/training/trajectory.py OUT ACCUMULATION PARALLEL [PRECISION]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from dali_pipelines.augmentations import PARAMS
from dali_pipelines.loader import ViewBatch
from dali_pipelines.outputs import SampleKeys
from iwm.train_config import OptimConfig, TrainConfig
from iwm.training.distributed import DistEnv, init_distributed
from iwm.training.optim import ScheduleValues, build_optimizer
from iwm.training.parallel import parallelize
from iwm.training.step import ForwardBackward, prepare_masks, train_step
from iwm.training.train_state import build_model
from tests.training.runs import tiny_config

BATCH, STEPS = 8, 4
FP32 = TrainConfig(precision="fp32", compile=False)


def batch_of(first: int, size: int, step: int) -> ViewBatch:
    """Return samples `first` to `first + size` of the step's batch."""
    generator = torch.Generator().manual_seed(step)
    views = torch.randint(0, 256, (2, BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
    params = torch.rand(BATCH, len(PARAMS), generator=generator) + 0.5
    part = slice(first, first + size)
    return ViewBatch(
        views[0, part], views[1, part], params[part], None, SampleKeys(torch.zeros(size, 1, dtype=torch.uint8))
    )


def trajectory(
    dist: DistEnv, accumulation: int = 1, train: TrainConfig = FP32
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the parameters after STEPS steps, and each step's loss averaged over processes."""
    config = replace(tiny_config(Path("unused"), STEPS), train=train, optim=OptimConfig(grad_clip=0.5))
    torch.manual_seed(0)
    model, _ = build_model(config, dist.device, BATCH // dist.size // accumulation)
    gradient = ForwardBackward(model, parallelize(model, dist, accumulation))
    optimizer, _ = build_optimizer(model, config.optim, dist.device)
    size = BATCH // dist.size // accumulation
    losses = []
    for step in range(STEPS):
        parts = range(accumulation)
        batches = [batch_of((part * dist.size + dist.rank) * size, size, step) for part in parts]
        masks = [prepare_masks(config, dist, step, part, size) for part in parts]
        values = ScheduleValues(lr=1e-2, weight_decay=0.1, ema=0.9)
        result = train_step(model, gradient, optimizer, batches, masks, values)
        losses.append(dist.mean(result.loss.clone()).item())
    state = model.state_dict()
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}, losses


if __name__ == "__main__":
    with init_distributed(TrainConfig(device="cpu")) as dist:
        precision = sys.argv[4] if len(sys.argv) > 4 else FP32.precision
        train = replace(FP32, parallel=sys.argv[3], precision=precision)
        state, losses = trajectory(dist, int(sys.argv[2]), train)
        if dist.is_main:
            torch.save({"state": state, "losses": losses}, sys.argv[1])

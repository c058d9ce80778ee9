"""Saving of sharded tensors by several real processes, checked against torch's own gathering.

torchrun --nproc_per_node N tests/training/sharded_save.py OUT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from iwm.train_config import TrainConfig
from iwm.training.checkpoint_writer import CheckpointWriter
from iwm.training.distributed import DistEnv, init_distributed
from iwm.training.host_copies import tensors_of
from iwm.training.optim import build_optimizer, load_optimizer_state, optimizer_state_dict
from iwm.training.parallel import parallelize
from iwm.training.train_state import build_model
from tests.training.runs import tiny_config
from tests.training.trajectory import FP32


def odd_tensors(dist: DistEnv) -> dict[str, Any]:
    """Return sharded tensors whose rows do not divide, with fewer rows than processes, replicated and plain ones."""
    mesh = init_device_mesh("cpu", (dist.size,))
    torch.manual_seed(0)
    full = {
        "five rows": torch.randn(5, 3),
        "one row": torch.randn(1, 2),
        "bfloat16": torch.randn(7, dtype=torch.bfloat16),
        "channels last": torch.randn(6, 3, 2, 2).to(memory_format=torch.channels_last),
        "many": torch.randn(1000, 33),
    }
    sharded = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in full.items()}
    return {
        **sharded,
        "replicated": distribute_tensor(torch.arange(4), mesh, [Replicate()]),
        "plain": [torch.ones(2), {"step": torch.tensor(3.0)}],
    }


def trained(dist: DistEnv) -> dict[str, Any]:
    """Return the state of a sharded model after a step of its optimiser, resumed from moments in channels-last."""
    config = replace(tiny_config(Path("unused"), 1), train=replace(FP32, parallel="fsdp"))
    model, _ = build_model(config, dist.device, 1)
    parallelize(model, dist, 1)
    optimizer, _ = build_optimizer(model, config.optim, dist.device)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    saved = optimizer_state_dict(optimizer)
    whole = {
        index: {name: channels_last(full(value)) for name, value in entry.items()}
        for index, entry in saved["state"].items()
    }
    load_optimizer_state(optimizer, {**saved, "state": whole})
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state[p][name]
                assert moment.to_local().stride() == p.to_local().stride(), "AdamW reads both in memory order"
    return {"model": model.state_dict(), "optimizer": optimizer_state_dict(optimizer)}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def main(out: Path) -> None:
    with init_distributed(TrainConfig(device="cpu")) as dist:
        content = {"odd": odd_tensors(dist), "state": trained(dist), "words": "same"}
        expected = [full(tensor).clone() for tensor in tensors_of(content)]

        def write(saved: Any, ranks: list[Any]) -> None:
            torch.save({"saved": saved, "ranks": ranks, "expected": expected}, out)

        def failed(error: OSError) -> None:
            raise error

        with CheckpointWriter(dist, write, failed) as writer:
            with CommDebugMode() as communication:
                writer.save(lambda: (content, {"rank": dist.rank}))
            assert communication.get_total_counts() == 0, "the training thread waits for no other process"
            for tensor in tensors_of(content):
                with torch.no_grad():
                    (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
            own = sum(tensor.to_local().nbytes for tensor in tensors_of(content) if isinstance(tensor, DTensor))
            if not dist.is_main:
                assert writer.host_bytes < own + 100, "a process copies its own shards alone"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

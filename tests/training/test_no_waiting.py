"""A training step, with the end of a window of metrics, contains no host-device synchronisation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dali_pipelines.loader import ViewBatch
from iwm.masking import PackedMasks
from iwm.model_config import ActionConfig, MaskingConfig
from iwm.models.world_model import WorldModel
from iwm.train_config import OptimConfig, TrainConfig
from iwm.training.cuda_graph import WARMUP_STEPS, build_forward_backward
from iwm.training.metric_window import MetricQueue, MetricWindow
from iwm.training.optim import ScheduleValues, build_optimizer
from iwm.training.parallel import parallelize
from iwm.training.step import prepare_masks, train_step
from tests.training.runs import alone, tiny_config
from tests.training.trajectory import BATCH, batch_of

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten._unique2, aten.equal}
"""Operators whose result or result shape the host reads from the device."""


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket not in READS, f"{function} reads a value back from the device"
        if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype != torch.bool for index in indices), f"{function} by a mask asks for its sum"
        if function.overloadpacket is aten.repeat_interleave:
            assert kwargs.get("output_size") is not None, "repeat_interleave without its size asks for it"
        return function(*args, **(kwargs or {}))


VARIANTS = [("iwm", "feature"), ("iwm", "sequence"), ("ijepa", "none")]


def prepared(kind: str, conditioning: str, device: torch.device) -> tuple[Any, ...]:
    config = replace(
        tiny_config(Path("unused"), 4),
        masking=MaskingConfig(type=kind),
        action=ActionConfig(conditioning=conditioning),
        train=TrainConfig(compile=device.type == "cuda"),
        optim=OptimConfig(grad_clip=0.5, implementation="torch"),
    )
    dist = replace(alone(), device=device)
    model = WorldModel(config).setup(device, compiled=config.train.compile)
    gradient, _ = build_forward_backward(model, parallelize(model, dist, 1), dist)
    optimizer, _ = build_optimizer(model, config.optim, device)
    batch = batch_of(0, BATCH, 0)
    batch = ViewBatch(*(part.to(device) for part in batch[:3]), batch.label, batch.keys)
    return config, dist, model, gradient, optimizer, batch


@pytest.mark.parametrize(("kind", "conditioning"), VARIANTS)
def test_no_operator_of_a_step_reads_a_value_back(kind: str, conditioning: str) -> None:
    config, dist, model, gradient, optimizer, batch = prepared(kind, conditioning, torch.device("cpu"))
    values = ScheduleValues(lr=1e-3, weight_decay=0.1, ema=0.9)
    masks: PackedMasks = prepare_masks(config, dist, 0, 0, BATCH)
    with NoReads():
        window = MetricWindow(dist.device)
        window.results.append(train_step(model, gradient, optimizer, [batch], [masks], values))
        window.end(dist, BATCH)


def test_the_check_finds_what_it_looks_for() -> None:
    value, mask = torch.ones(3), torch.tensor([True, False, True])
    for reading in (lambda: value.sum().item(), lambda: value[mask], lambda: mask.nonzero(), lambda: bool(mask[0])):
        with pytest.raises(AssertionError), NoReads():
            reading()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch's sync debug mode watches GPUs")
@pytest.mark.parametrize(("kind", "conditioning"), VARIANTS)
def test_torch_sees_no_synchronisation_in_a_step_on_a_gpu(kind: str, conditioning: str) -> None:
    values = ScheduleValues(lr=1e-3, weight_decay=0.1, ema=0.9)
    with torch.cuda.stream(torch.cuda.Stream()):
        config, dist, model, gradient, optimizer, batch = prepared(kind, conditioning, torch.device("cuda", 0))
        queue, losses = MetricQueue(), list[float]()
        for step in range(WARMUP_STEPS + 4):
            torch.cuda.set_sync_debug_mode("error" if step > WARMUP_STEPS else "default")
            try:
                masks = prepare_masks(config, dist, step, 0, BATCH)
                window = MetricWindow(dist.device)
                window.results.append(train_step(model, gradient, optimizer, [batch], [masks], values))
                queue.append(window.end(dist, BATCH), lambda metrics: losses.append(metrics.loss.item()))
                queue.write_ready()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        queue.write_all()
        assert len(losses) == WARMUP_STEPS + 4

"""Training with the CUDA graph gives the same results as kernel by kernel."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dali_pipelines.loader import ViewBatch
from iwm.masking import pack_masks
from iwm.model_config import MaskingConfig
from iwm.models.world_model import WorldModel
from iwm.train_config import OptimConfig, TrainConfig
from iwm.training.checkpoint import load_newest
from iwm.training.cuda_graph import WARMUP_STEPS, GraphedForwardBackward, build_forward_backward
from iwm.training.distributed import init_distributed
from iwm.training.step import prepare_masks, sample_step_masks
from tests.training.runs import alone, assert_same, command, finish, tiny_config
from tests.training.trajectory import BATCH, batch_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable GPU here: only a GPU has CUDA graphs")


@needs_gpu
@pytest.mark.parametrize("recipe", ["feature", "ijepa"])
def test_a_replayed_training_is_the_same_to_the_bit(recipe: str, tiny_shards: Path, tmp_path: Path) -> None:
    words = ("--masking.type", "ijepa", "--action.conditioning", "none") if recipe == "ijepa" else ()
    for name in ("cuda-graph", "no-cuda-graph"):
        options = ("--train.device", "cuda", "--train.compile", "--train.deterministic", f"--train.{name}", *words)
        output = finish(command(tiny_shards, tmp_path / name, 20, *options))
        assert ("as one CUDA graph" in output) == (name == "cuda-graph")
    one, other = load_newest(tmp_path / "cuda-graph"), load_newest(tmp_path / "no-cuda-graph")
    assert one is not None
    assert other is not None
    assert_same(one.model, other.model)
    assert_same(one.optimizer, other.optimizer)


@needs_gpu
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_of_another_shape_runs_and_the_next_is_captured_again(accumulation: int) -> None:
    train = TrainConfig(device="cuda", compile=True, precision="fp32")
    config = replace(
        tiny_config(Path("unused"), 4),
        train=train,
        masking=MaskingConfig(type="ijepa"),
        optim=OptimConfig(grad_clip=0.5),
    )
    with init_distributed(train) as dist:
        torch.manual_seed(0)
        model = WorldModel(config).setup(dist.device, compiled=True)
        graphed, _ = build_forward_backward(model, model, dist)
        assert isinstance(graphed, GraphedForwardBackward)
        eager, _ = build_forward_backward(model, model, replace(dist, size=2))
        size = BATCH // accumulation
        for step in range(2 * WARMUP_STEPS + 3):
            cpu = [batch_of(part * size, size, step) for part in range(accumulation)]
            batches = [ViewBatch(*(t.to(dist.device) for t in batch[:3]), None, batch.keys) for batch in cpu]
            masks = [prepare_masks(config, dist, step, part, size) for part in range(accumulation)]
            if step == WARMUP_STEPS + 2:
                drawn = sample_step_masks(config, dist, step, 0, size)
                masks[0] = pack_masks(drawn, None, 0, config.loss).to(dist.device)
            expected = eager(batches, masks)
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            result = graphed(batches, masks)
            assert torch.allclose(result.loss, expected.loss, rtol=1e-5)
            assert torch.allclose(result.gradient_norm, expected.gradient_norm, rtol=1e-4)
            found = [p.grad for p in model.parameters() if p.grad is not None]
            assert len(found) == len(gradients)
            for one, other in zip(found, gradients, strict=True):
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_without_a_gpu_steps_run_kernel_by_kernel_and_this_is_reported() -> None:
    config = tiny_config(Path("unused"), 4)
    model = WorldModel(config)
    assert build_forward_backward(model, model, alone())[1] == "kernel by kernel (no GPU)"
    off = WorldModel(replace(config, train=replace(config.train, cuda_graph=False)))
    assert build_forward_backward(off, off, alone())[1] == "kernel by kernel"

"""Predictions of docs/scaling.md: sizes equal those of real models, times are plausible, tables are printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import scaling_model as formulas
import torch
from scaling_model import BUCKET, TABLES, ModelWork, model, parameters, predict

from iwm.models.world_model import WorldModel
from iwm.recipes import demo
from iwm.training.optim import build_optimizer, optimizer_state_dict

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
SMALL = ModelWork(trained=120_000_000, target=86_000_000, rate=3000, backward=0.6)


def test_sizes_are_those_of_a_real_model_its_gradients_and_its_checkpoint() -> None:
    config = demo()
    real = WorldModel(config)
    trained, target = parameters(real, trained=True), parameters(real, trained=False)
    optimizer, _ = build_optimizer(real, replace(config.optim, implementation="torch"), torch.device("cpu"))
    for p in real.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    assert formulas.gradient_bytes(trained) == sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    state = optimizer_state_dict(optimizer)["state"].values()
    moments = sum(entry["exp_avg"].nbytes + entry["exp_avg_sq"].nbytes for entry in state)
    saved = sum(value.nbytes for value in real.state_dict().values())
    assert formulas.checkpoint_bytes(trained, target) == moments + saved
    assert formulas.state_bytes(trained, target) == moments + saved + formulas.gradient_bytes(trained)


def test_parameters_are_counted_without_memory_for_them() -> None:
    counted, real = model("demo"), WorldModel(demo())
    assert parameters(counted, trained=True) == parameters(real, trained=True)
    assert all(p.is_meta for p in counted.parameters())


def test_a_ring_is_faster_within_a_machine_and_a_tree_through_many() -> None:
    assert formulas.all_reduce(BUCKET, 1) == 0
    assert formulas.all_reduce(BUCKET, 8) == formulas.ring(BUCKET, 8) < formulas.tree(BUCKET, 8)
    assert formulas.all_reduce(BUCKET, 512) == formulas.tree(BUCKET, 512) < formulas.ring(BUCKET, 512)


def test_large_buffers_move_at_the_bandwidth_that_is_assumed() -> None:
    size = 10**12
    assert formulas.all_reduce_traffic(size, 8) == 2 * 7 / 8 * size
    for gpus, bandwidth in ((8, formulas.NVLINK), (64, formulas.NETWORK)):
        reached = formulas.all_reduce_traffic(size, gpus) / formulas.all_reduce(size, gpus)
        assert reached == pytest.approx(bandwidth, rel=0.01)


def test_one_gpu_steps_at_its_rate_and_small_batches_pay_for_the_update() -> None:
    assert formulas.step_alone(SMALL, 256) == pytest.approx(256 / 3000)
    assert formulas.step_alone(SMALL, 4) > 4 / 3000 + 0.9 * formulas.update_seconds(SMALL.trained, SMALL.target)
    assert predict(SMALL, 1, 256).efficiency == 1


def test_an_exchange_is_hidden_behind_a_long_backward_pass_but_for_its_last_bucket() -> None:
    buckets = -(-4 * SMALL.trained // BUCKET)
    long = predict(SMALL, 64, 2048)
    assert long.exposed == pytest.approx(long.exchange / buckets)
    short = predict(SMALL, 64, 4)
    assert short.exchange == long.exchange
    assert short.exposed > short.exchange - 0.6 * short.alone
    assert short.efficiency < 0.3 < 0.99 < long.efficiency


def test_efficiency_falls_with_gpus_and_rises_with_images() -> None:
    by_gpus = [predict(SMALL, gpus, 32).efficiency for gpus in (1, 8, 16, 64, 128, 512)]
    by_images = [predict(SMALL, 64, images).efficiency for images in (4, 16, 64, 256)]
    assert by_gpus == sorted(by_gpus, reverse=True)
    assert by_images == sorted(by_images)


@pytest.mark.parametrize("title", TABLES)
def test_the_documents_tables_are_the_printed_ones(title: str) -> None:
    assert TABLES[title]() in DOCUMENT.read_text(), "print them anew: python benchmarks/scaling_model.py"

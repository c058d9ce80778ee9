"""Training on several processes or in several passes equals training on one process in one pass."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iwm.config import ConfigError
from iwm.train_config import TrainConfig
from iwm.train_options import parse
from iwm.training.checkpoint import checkpoint_path, load_newest
from iwm.training.distributed import init_distributed
from iwm.training.train_state import split_batch
from tests.training.runs import alone, arguments, command, finish, metrics, train_here
from tests.training.trajectory import FP32, trajectory


def assert_same_trajectory(state: dict[str, torch.Tensor], losses: list[float]) -> None:
    expected, expected_losses = trajectory(alone())
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, value in expected.items():
        one, other = state[name], value
        if name.endswith("qkv.bias"):
            # Softmax is invariant to the keys' bias: its gradient is rounding noise, which Adam amplifies.
            one, other = (torch.cat((bias.chunk(3)[0], bias.chunk(3)[2])) for bias in (one, other))
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("accumulation", "parallel"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, accumulation: int, parallel: str) -> None:
    out = tmp_path / "state.pt"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output = finish([sys.executable, *launcher, "tests/training/trajectory.py", str(out), str(accumulation), parallel])
    assert "Warning" not in output
    saved = torch.load(out, weights_only=True)
    assert_same_trajectory(saved["state"], saved["losses"])


def test_two_passes_take_the_step_of_one() -> None:
    first, *_, last = trajectory(alone())[1]
    assert last < 0.7 * first, "nothing is trained, so that any two trajectories would agree"
    assert_same_trajectory(*trajectory(alone(), accumulation=2))


def test_recomputed_activations_give_the_same_steps() -> None:
    assert_same_trajectory(*trajectory(alone(), train=replace(FP32, activation_checkpointing=True)))


def test_a_sharded_run_validates_saves_and_resumes_like_any_other(tiny_shards: Path, tmp_path: Path) -> None:
    """Checkpoints are interchangeable: one process resumes from a sharded run's, and a sharded run from its own."""
    words, sharded = ("--log.eval-interval", "10"), ("--train.parallel", "fsdp")
    finish(command(tiny_shards, tmp_path / "sharded", 20, *words, *sharded, processes=2))
    assert sum("mrr_pooled" in line for line in metrics(tmp_path / "sharded")) == 2
    whole = {name: parse(arguments(tiny_shards, tmp_path / name, 20, *words)).config for name in ("sharded", "whole")}
    train_here(whole["whole"], tmp_path / "whole")
    for name in whole:
        checkpoint_path(tmp_path / name, 20).unlink()
    train_here(whole["sharded"], tmp_path / "sharded")
    output = finish(command(tiny_shards, tmp_path / "whole", 20, *words, *sharded, processes=2))
    assert "resuming from step 10" in output
    assert all(load_newest(tmp_path / name).step == 20 for name in whole)


NAMES = ("data.global_batch_size", "data.micro_batch_size")


def test_a_batch_is_split_evenly_or_refused() -> None:
    assert split_batch(96, 16, 2, NAMES) == (16, 3)
    assert split_batch(96, None, 4, NAMES) == (24, 1)
    with pytest.raises(ConfigError, match=r"data\.global_batch_size 96 cannot be split over 5 processes"):
        split_batch(96, 16, 5, NAMES)
    with pytest.raises(ConfigError, match=r"data\.micro_batch_size 16 does not divide the 24 images"):
        split_batch(96, 16, 4, NAMES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_requesting_a_missing_gpu_is_a_clear_error() -> None:
    with (
        pytest.raises(ConfigError, match=r"train\.device cuda: torch sees no GPU"),
        init_distributed(TrainConfig(device="cuda")),
    ):
        pass

"""Several processes, and several passes, train what one process trains in one pass."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iwm.config import ConfigError, Train
from iwm.train import parse
from iwm.training.checkpoint import newest, path_of
from iwm.training.distributed import world
from iwm.training.session import split_batch
from tests.training.runs import alone, arguments, command, finish, metrics, train_here
from tests.training.trajectory import FP32, trajectory


def assert_same_trajectory(state: dict[str, torch.Tensor], losses: list[float]) -> None:
    expected, expected_losses = trajectory(alone())
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, value in expected.items():
        one, other = state[name], value
        if name.endswith("qkv.bias"):
            # A key's bias has no gradient but rounding, which Adam blows up: softmax does not see it.
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


def test_a_divided_run_watches_its_health_saves_and_goes_on_as_any_other_run_would(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """Its checkpoint is like any other: a run on one process resumes from it, and one that is divided from theirs."""
    words, divided = ("--log.health-every", "10"), ("--train.parallel", "fsdp")
    finish(command(tiny_shards, tmp_path / "divided", 20, *words, *divided, processes=2))
    assert sum("mrr_pooled" in line for line in metrics(tmp_path / "divided")) == 2
    whole = {name: parse(arguments(tiny_shards, tmp_path / name, 20, *words)).config for name in ("divided", "whole")}
    train_here(whole["whole"], tmp_path / "whole")
    for name in whole:
        path_of(tmp_path / name, 20).unlink()
    train_here(whole["divided"], tmp_path / "divided")
    output = finish(command(tiny_shards, tmp_path / "whole", 20, *words, *divided, processes=2))
    assert "going on from step 10" in output
    assert all(newest(tmp_path / name).step == 20 for name in whole)


def test_a_batch_is_split_evenly_or_refused() -> None:
    assert split_batch(96, 16, 2, "data.") == (16, 3)
    assert split_batch(96, None, 4, "data.") == (24, 1)
    with pytest.raises(ConfigError, match=r"data\.batch 96 cannot be split over 5 processes"):
        split_batch(96, 16, 5, "data.")
    with pytest.raises(ConfigError, match=r"data\.micro_batch 16 does not divide the 24 images"):
        split_batch(96, 16, 4, "data.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_a_gpu_where_there_is_none_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"train\.device cuda: torch sees no GPU"), world(Train(device="cuda")):
        pass

"""Training on a high-priority CUDA stream gives the same results."""

from pathlib import Path

import pytest
import torch

from iwm.training.checkpoint import load_newest
from tests.training.runs import assert_same, command, finish


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable GPU here: only a GPU has streams")
def test_a_priority_stream_changes_no_bit(tiny_shards: Path, tmp_path: Path) -> None:
    for name in ("priority", "no-priority"):
        options = ("--train.device", "cuda", "--train.deterministic", f"--train.{name}-stream")
        finish(command(tiny_shards, tmp_path / name, 20, *options))
    one, other = load_newest(tmp_path / "priority"), load_newest(tmp_path / "no-priority")
    assert one is not None
    assert other is not None
    assert_same(one.model, other.model)
    assert_same(one.optimizer, other.optimizer)

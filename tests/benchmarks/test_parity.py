"""Parity of views and their replay: every op of both implementations is compared, and close."""

from __future__ import annotations

from pathlib import Path

from parity import ParityOptions, measured

from dali_pipelines.augmentations import SINGLE_OP


def test_every_op_is_compared_with_its_replay(tiny_shards: Path) -> None:
    rows = measured(ParityOptions(device="cpu", images=8, size=48), tiny_shards, triton=False)
    ops = ["none (decode, crop, resize)", *SINGLE_OP, "all, as in A.1"]
    assert [(row["colour"], row["op"]) for row in rows] == [(c, op) for c in ("linear", "torchvision") for op in ops]
    assert all(row["replay"]["mean"] < 1 for row in rows)

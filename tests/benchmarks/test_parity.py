"""Parity of views and their replay: every op of both implementations is compared, and close."""

from __future__ import annotations

from pathlib import Path

import torch
from parity import ParityOptions, between_definitions, measured

from dali_pipelines.augmentations import SINGLE_OP


def test_every_op_is_compared_with_its_replay(tiny_shards: Path) -> None:
    rows = measured(ParityOptions(device="cpu", images=8, size=48), tiny_shards, triton=False)
    ops = ["none (decode, crop, resize)", *SINGLE_OP, "all, as in A.1"]
    assert [(row["colour"], row["op"]) for row in rows] == [(c, op) for c in ("linear", "torchvision") for op in ops]
    assert all(row["replay"]["mean"] < 1 for row in rows)


def test_definitions_of_the_jitter_are_nearer_to_one_another_than_to_the_unchanged_image() -> None:
    coarse = torch.randint(0, 256, (16, 3, 6, 6), generator=torch.Generator().manual_seed(0)).float()
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear").byte().permute(0, 2, 3, 1).contiguous()
    rows = {row["op"]: row for row in between_definitions(images)}
    assert {"brightness", "contrast", "saturation", "hue", "jitter of A.1", "source view of strong"} <= set(rows)
    assert "source view of destructive" not in rows
    for row in rows.values():
        assert 0 < row["between"] < min(row["linear"], row["torchvision"]), row["op"]
    assert rows["brightness"]["between"] < 2

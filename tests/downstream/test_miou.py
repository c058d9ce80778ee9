"""Mean intersection over union against sets of pixels counted in numpy, on one process and on two."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing as mp

from iwm.config import ConfigError
from iwm.downstream.segmentation_task import ConfusionMatrix

CPU = torch.device("cpu")


def drawn(seed: int = 0, images: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions and masks of 7 classes with ignored pixels; 5 occurs nowhere and 6 only in predictions."""
    rng = np.random.default_rng(seed)
    masks = rng.choice([0, 1, 2, 3, 4, 255], size=(images, 9, 11))
    predicted = np.where(rng.random(masks.shape) < 0.6, masks.clip(0, 4), rng.choice([0, 1, 2, 3, 4, 6], masks.shape))
    return torch.from_numpy(predicted), torch.from_numpy(masks.astype(np.uint8))


def by_sets(predicted: np.ndarray, masks: np.ndarray, classes: int = 7) -> list[float]:
    counted = masks != 255
    shares = []
    for c in range(classes):
        true, positive = (masks == c) & counted, (predicted == c) & counted
        union = (true | positive).sum()
        shares.append((true & positive).sum() / union if union else math.nan)
    return shares


def test_scores_are_those_of_sets_of_pixels() -> None:
    predicted, masks = drawn()
    confusion = ConfusionMatrix(7, CPU)
    for one, other in zip(predicted, masks, strict=True):
        confusion.add(one, other)
    score = confusion.score()
    expected = by_sets(predicted.numpy(), masks.numpy())
    assert score.iou == pytest.approx(expected, nan_ok=True)
    assert math.isnan(score.iou[5])
    assert score.iou[6] == 0
    assert score.miou == pytest.approx(np.nanmean(expected))
    counted = masks != 255
    assert score.pixel_accuracy == pytest.approx((predicted == masks)[counted].double().mean().item())
    assert confusion.score().miou == score.miou


def test_whole_batches_and_single_images_of_any_size_count_the_same() -> None:
    predicted, masks = drawn()
    whole, single = ConfusionMatrix(7, CPU), ConfusionMatrix(7, CPU)
    whole.add(predicted, masks)
    for one, other in zip(predicted, masks, strict=True):
        single.add(one[:, :4], other[:, :4])
        single.add(one[:, 4:], other[:, 4:])
    assert torch.equal(whole.counts, single.counts)


def test_an_id_that_is_no_class_is_told() -> None:
    predicted, masks = drawn()
    masks[0, 0, :3] = torch.tensor([7, 150, 254], dtype=torch.uint8)
    confusion = ConfusionMatrix(7, CPU)
    confusion.add(predicted, masks)
    with pytest.raises(ConfigError, match=r"3 pixels have an id outside the classes 0 to 6, and 255 is ignored"):
        confusion.score()


def test_nothing_but_void_is_no_score() -> None:
    confusion = ConfusionMatrix(7, CPU)
    confusion.add(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="every pixel is ignored"):
        confusion.score()


def half(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    predicted, masks = drawn()
    confusion = ConfusionMatrix(7, CPU)
    confusion.add(predicted[rank::2], masks[rank::2])
    np.save(f"{folder}/{rank}.npy", [confusion.score().miou, confusion.score().pixel_accuracy])
    torch.distributed.destroy_process_group()


def test_processes_score_what_all_of_them_counted(tmp_path: Path) -> None:
    mp.spawn(half, args=(str(tmp_path),), nprocs=2)
    predicted, masks = drawn()
    confusion = ConfusionMatrix(7, CPU)
    confusion.add(predicted, masks)
    score = confusion.score()
    for rank in (0, 1):
        assert np.load(tmp_path / f"{rank}.npy") == pytest.approx([score.miou, score.pixel_accuracy])

"""Segmentation: training on crops, evaluation on whole images of any size, and errors for wrong mask ids."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from dali_pipelines.augmentations import NO_PHOTOMETRIC
from dali_pipelines.crops import SegmentationCrops
from dali_pipelines.validation_loader import FullImageLoader
from iwm.config import Config, ConfigError
from iwm.downstream.segmentation_task import SegmentationTask, pad_to_patches
from iwm.downstream.settings import DataSettings
from iwm.downstream.study import PIXELS, FrozenEncoders, Study, Trial
from iwm.downstream.trials import Segmenter
from iwm.encoder_outputs import LayerNormKind
from iwm.models.backbone import frozen_backbone
from iwm.models.heads import UPerNet
from iwm.models.predictor_backbone import PredictorBackbone, copy_pretrained
from iwm.models.world_model import WorldModel
from shards.errors import ShardError
from tests.training.runs import alone

Leverage = Callable[..., dict[str, Any]]
BOXES: dict[str, Any] = {"classes": 4, "reduce_zero_label": False, "channels": 16, "validate_every": 100.0}


def test_encoder_and_predictor_learn_to_find_the_boxes(leverage: Leverage) -> None:
    """Predicting only background has an mIoU of 0.2."""
    plain = SegmentationCrops(scale=(1.2, 1.6), photometric=NO_PHOTOMETRIC)
    parts = ("encoder", "predictor")
    result = leverage("segmentation", **BOXES, parts=parts, lr=(5e-3,), steps=120, crops=plain, batch_size=16)
    encoder, predictor = result["trials"].values()
    assert encoder["miou"]["mean"] > 0.45
    assert predictor["miou"]["mean"] > 0.25
    assert encoder["miou"]["mean"] == pytest.approx(np.mean(encoder["per_class"]))
    assert "standard_error" not in encoder["miou"]
    assert result["val_images"] == 48


def test_every_part_is_trained(leverage: Leverage) -> None:
    parts = ("encoder", "predictor", "end-to-end")
    result = leverage("segmentation", **BOXES, parts=parts, predictors=("pretrained", "random"), lr=(1e-4,), steps=2)
    trained = [(trial["part"], trial["predictor"]) for trial in result["trials"].values()]
    both = [(part, kind) for part in parts[1:] for kind in ("pretrained", "random")]
    assert trained == [("encoder", None), *both]


def test_without_a_class_zero_the_background_does_not_count(leverage: Leverage) -> None:
    result = leverage("segmentation", classes=3, channels=8, lr=(1e-3,), steps=1)
    assert len(next(iter(result["trials"].values()))["per_class"]) == 3


@pytest.mark.parametrize("part", ["encoder", "predictor", "end-to-end"])
@pytest.mark.parametrize("layer_norm", get_args(LayerNormKind))
def test_every_trained_parameter_has_a_gradient(small: Config, part: str, layer_norm: LayerNormKind) -> None:
    """A trial on several processes (DDP) fails otherwise."""
    model = WorldModel(small)
    encoder = frozen_backbone(model.target_encoder)
    predictor = None
    if part != "encoder":
        predictor = PredictorBackbone(copy_pretrained(model.predictor), return_layers_only=True)
    width = encoder.embed_dim if predictor is None else predictor.predictor_dim
    trial = Segmenter(
        UPerNet(width, 4, channels=8, layer_norm=layer_norm),
        encoder.patch_size,
        backbone=None if part == "predictor" else encoder.finetune_copy(),
        predictor_backbone=predictor,
        features="teacher",
        num_prefix_tokens=0,
    ).train()
    pixels = torch.randint(0, 256, (2, 32, 32, 3)).float()
    shared = {PIXELS: pixels, "teacher": encoder.tokens(pixels).detach()}
    trial.loss(shared, [torch.randint(0, 4, (2, 32, 32), dtype=torch.uint8)]).backward()
    for name, parameter in trial.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


class _Perfect(Trial):
    """Perfect predictions: looks up the mask by the first grey levels of the image."""

    def __init__(self, masks: dict[tuple[int, ...], torch.Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def loss(self, shared: Any, targets: Any) -> torch.Tensor:
        return torch.zeros(())

    def logits(self, shared: Any, task: int) -> torch.Tensor:
        pixels = shared[PIXELS]
        mask = self.masks[tuple(pixels[0, 0, :8, 0].int().tolist())]
        padded = torch.zeros(pixels.shape[1:3], dtype=torch.long)
        padded[: mask.shape[0], : mask.shape[1]] = mask
        return torch.nn.functional.one_hot(padded, 4).permute(2, 0, 1)[None].float()


def test_whole_images_are_judged_at_their_own_size(boxes: Path) -> None:
    """48 px is not a multiple of the patch size 32. Padding is cropped again, so perfect predictions score 1."""
    task = opened(boxes, patch=32)
    (scores,) = task.evaluate(perfect(boxes), 0, [0])
    assert scores["miou"] == scores["pixel_accuracy"] == 1.0
    assert task.metadata()["val_images"] == 48


def test_held_out_ids_that_are_no_class_are_told_with_their_split(boxes: Path) -> None:
    with pytest.raises(ConfigError, match=r"shards, split 'val': masks: \d+ pixels have .* \(--classes"):
        opened(boxes, classes=3).evaluate(perfect(boxes), 0, [0])


def perfect(shards: Path) -> Study:
    masks = {
        tuple(image[0, :8, 0].int().tolist()): mask.long().clone()
        for image, mask, _ in FullImageLoader(shards, "val", num_threads=1)
    }
    return Study({"perfect": _Perfect(masks)}, FrozenEncoders({}), seeds=[0]).eval()


def opened(shards: Path, **options: Any) -> SegmentationTask:
    loading = {"device": "cpu", "rank": 0, "world_size": 1, "num_threads": 1, "prefetch_queue_depth": 1}
    made: dict[str, Any] = {"classes": 4, "reduce_zero_label": False, "patch": 8, "batch_size": 4, "seed": 0}
    crops = SegmentationCrops(size=32, ignore_index=255)
    return SegmentationTask(shards, "train", "val", crops, dist=alone(), loading=loading, **(made | options))


def test_images_are_filled_up_with_the_mean_colour() -> None:
    image = torch.randint(0, 256, (30, 45, 3), dtype=torch.uint8)
    filled = pad_to_patches(image, 16)
    assert filled.shape == (32, 48, 3)
    assert torch.equal(filled[:30, :45], image.float())
    assert filled[31, 47].tolist() == [124.0, 116.0, 104.0]
    assert pad_to_patches(image[:5, :5], 16).shape == (32, 32, 3)


def test_zero_becomes_void_where_it_is_of_no_class(boxes: Path) -> None:
    _, with_zero = opened(boxes).get_batch(1)
    _, without = opened(boxes, classes=3, reduce_zero_label=True).get_batch(1)
    assert set(with_zero.unique().tolist()) <= {0, 1, 2, 3, 255}
    assert torch.equal(without[with_zero != 255].int(), (with_zero[with_zero != 255].int() - 1) % 256)


def test_ids_that_are_no_class_are_told_before_anything_is_learnt(leverage: Leverage) -> None:
    with pytest.raises(ConfigError, match=r"split 'train': [\d,]+ pixels have an id outside --classes 2: "):
        leverage("segmentation", classes=2, reduce_zero_label=False, channels=8)


def test_shards_without_masks_are_told(leverage: Leverage, tiny_shards: Path) -> None:
    with pytest.raises(ShardError, match="mask"):
        leverage("segmentation", data=DataSettings(shards=str(tiny_shards), num_threads=1))


def test_a_class_that_occurs_nowhere_is_left_out_of_the_mean(leverage: Leverage, run: Path) -> None:
    result = leverage("segmentation", **{**BOXES, "classes": 9}, lr=(1e-3,), steps=1)
    per_class = next(iter(result["trials"].values()))["per_class"]
    known = [iou for iou in per_class if iou is not None]
    assert 4 <= len(known) <= 9
    assert next(iter(result["trials"].values()))["miou"]["mean"] == pytest.approx(math.fsum(known) / len(known))

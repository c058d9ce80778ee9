"""Segmentation task: crops with masks for training, whole held-out images for evaluation (paper, A.2).

The metric is mean intersection over union, mIoU (table 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dali_pipelines.crops import SegmentationCrops
from dali_pipelines.loader import SegmentationLoader
from dali_pipelines.validation_loader import FullImageLoader
from iwm.config import ConfigError
from iwm.downstream.study import Evaluated, Study
from iwm.downstream.tasks import selection_metadata
from iwm.downstream.trials import pad_to_patches
from iwm.models.heads import IGNORE_INDEX, upsample
from iwm.training.distributed import DistEnv
from shards.cache import location_of
from shards.split_part import ALL_IMAGES, TrainingParts


class SegmentationTask:
    """Images with masks of `classes` classes.

    With reduce_zero_label, ids 1 to `classes` are the classes and 0 is ignored (ADE20k). Without it, ids 0 to
    `classes` - 1 are the classes and 255 is ignored.
    """

    metric = "miou"
    proportion_metrics: tuple[str, ...] = ()
    name = "masks"

    def __init__(
        self,
        shards: Path,
        train: str,
        val: str,
        crops: SegmentationCrops,
        *,
        classes: int,
        reduce_zero_label: bool,
        patch: int,
        batch_size: int,
        seed: int,
        dist: DistEnv,
        loading: dict[str, Any],
        parts: TrainingParts = ALL_IMAGES,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Open the loaders. parts: those of the training split.

        patch: patch size of the encoder; whole images are padded to multiples of it. loading: arguments of all loaders
        (context.loading_of). Raises ShardError for shards without masks, LoaderStateError for a state of other data.
        """
        self.classes, self._reduce_zero_label, self._patch, self._dist = classes, reduce_zero_label, patch, dist
        self._shards, self._train, self._val = shards, train, val
        self._loader = SegmentationLoader(
            shards, train, crops, batch_size=batch_size, seed=seed, part=parts.training, state=state, **loading
        )
        self._held_out = {"val": FullImageLoader(shards, val, **loading)}
        if parts.selection is not None:
            self._held_out["selection"] = FullImageLoader(shards, train, part=parts.selection, **loading)
        self._wrong = torch.zeros((), dtype=torch.int64, device=dist.device)
        self._evaluated = selection_metadata(parts)

    @property
    def images(self) -> int:
        return self._loader.samples_per_epoch

    def get_batch(self, pass_index: int) -> tuple[Tensor, Tensor]:
        images, masks, _ = next(self._loader)
        ids = self._ids(masks)
        wrong = (ids >= self.classes) & (ids != IGNORE_INDEX)
        self._wrong += wrong.sum()
        if pass_index == 0:
            self._check()
        return images, ids.masked_fill(wrong, IGNORE_INDEX)

    def _ids(self, masks: UInt8[Tensor, "*pixels"]) -> UInt8[Tensor, "*pixels"]:
        """Return classes from 0, and IGNORE_INDEX. With reduce_zero_label, 0 - 1 is 255 in 8 bits, the IGNORE_INDEX."""
        return masks - 1 if self._reduce_zero_label else masks.clone()

    def _check(self) -> None:
        """Raise ConfigError where masks have ids outside the classes. Waits for the device, so it is called rarely."""
        wrong = int(self._wrong.item())
        if wrong:
            first = int(self._reduce_zero_label)
            raise ConfigError(
                f"{self._shards}, split '{self._train}': {wrong:,} pixels have an id outside --classes "
                f"{self.classes}: classes are {first} to {self.classes - 1 + first}, and {0 if first else 255} is "
                "ignored; change --classes, or use --reduce-zero-label or --no-reduce-zero-label"
            )

    def state(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def evaluate(
        self, study: Study, task_index: int, trials: Sequence[int], images: Evaluated = "val"
    ) -> list[dict[str, Any]]:
        """Return mIoU and pixel accuracy (0 to 1) on whole images at their own size, with interpolated positions."""
        self._check()
        confusions = [ConfusionMatrix(self.classes, self._dist.device) for _ in trials]
        # Each image size would be compiled separately.
        with torch.compiler.set_stance("force_eager"):
            for image, mask, _ in self._held_out[images]:
                for confusion, logits in zip(confusions, self._predict(study, task_index, trials, image), strict=True):
                    confusion.add(logits, self._ids(mask))
        try:
            scores = [confusion.score() for confusion in confusions]
        except ConfigError as error:
            split = self._val if images == "val" else self._train
            raise ConfigError(f"{self._shards}, split '{split}': {error} (--classes, --reduce-zero-label)") from error
        if images == "val":
            count = self._dist.sum(torch.tensor(float(len(self._held_out[images])), device=self._dist.device))
            self._evaluated |= {"val_images": int(count.item())}
        return [
            {
                "miou": score.miou,
                "pixel_accuracy": score.pixel_accuracy,
                "per_class": [None if math.isnan(iou) else iou for iou in score.iou],
            }
            for score in scores
        ]

    def _predict(
        self, study: Study, task_index: int, trials: Sequence[int], image: UInt8[Tensor, "h w 3"]
    ) -> list[Int64[Tensor, "h w"]]:
        """Return the class of every pixel, by trial."""
        height, width = image.shape[:2]
        padded = pad_to_patches(image, self._patch)
        return [
            upsample(logits, padded.shape[:2])[0, :, :height, :width].argmax(dim=0)
            for logits in study.predict(padded[None], task_index, trials)
        ]

    def metadata(self) -> dict[str, Any]:
        return {
            "shards": location_of(self._shards),
            "train": self._train,
            "split": self._val,
            "label": "masks",
            "classes": self.classes,
            "train_images": self._loader.samples_per_epoch,
            "chance": None,
        } | self._evaluated


@dataclass(frozen=True)
class SegmentationScore:
    """Scores of a confusion matrix (0 to 1)."""

    miou: float
    """Mean of `iou` over the classes that occur in the masks or in the predictions."""
    iou: list[float]
    """Intersection over union of each class; NaN for a class that does not occur."""
    pixel_accuracy: float
    """Share of correctly classified pixels."""


class ConfusionMatrix:
    """Counts of pixels by true and predicted class, on the device. Only `score` waits for the device."""

    def __init__(self, classes: int, device: torch.device, ignore_index: int = IGNORE_INDEX) -> None:
        """Start with zero counts. ignore_index: id of pixels that are not counted."""
        self.classes, self.ignore_index = classes, ignore_index
        # The last row and column count ids outside the classes, for which `score` raises an error.
        self.counts = torch.zeros(classes + 1, classes + 1, dtype=torch.int64, device=device)

    def add(self, predicted: Int64[Tensor, "*pixels"], masks: UInt8[Tensor, "*pixels"]) -> None:
        """Count the pixels of any number of images."""
        size = self.classes + 1
        true = masks.flatten().long()
        counted = (true != self.ignore_index).long()
        cell = true.clamp(0, self.classes) * size + predicted.flatten().clamp(0, self.classes)
        # An ignored pixel adds 0. Selecting pixels by a mask would wait for the device.
        self.counts.view(-1).scatter_add_(0, cell, counted)

    def score(self) -> SegmentationScore:
        """Return the scores over all processes. Every process must call it.

        Raises ConfigError where no pixel was counted, or an id is neither a class nor ignore_index.
        """
        counts = self.counts.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        counts = counts.cpu()
        wrong = int(counts[self.classes].sum() + counts[:, self.classes].sum())
        if wrong:
            raise ConfigError(
                f"masks: {wrong} pixels have an id outside the classes 0 to {self.classes - 1}, and "
                f"{self.ignore_index} is ignored; compare the number of classes with the masks"
            )
        return segmentation_metrics(counts[: self.classes, : self.classes])


def segmentation_metrics(counts: Int64[Tensor, "c c"]) -> SegmentationScore:
    """Return the scores of a confusion matrix: rows are true classes, columns are predicted classes.

    Raises ConfigError where nothing was counted.
    """
    if not counts.any():
        raise ConfigError("masks: every pixel is ignored, so there is nothing to score")
    counts = counts.double()
    both, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou: Float[Tensor, " c"] = both / (true + predicted - both)  # NaN (0/0) for a class that does not occur
    return SegmentationScore(iou.nanmean().item(), iou.tolist(), (both.sum() / counts.sum()).item())

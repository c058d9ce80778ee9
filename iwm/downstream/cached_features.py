"""Classification task of cached features: they are computed once, from centre crops (paper, A.2).

Training of heads is then many times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from rich.progress import track
from timm.data.mixup import mixup_target
from torch import Tensor

from dali_pipelines.crops import Interpolation
from dali_pipelines.seeds import derive_seed
from dali_pipelines.validation_loader import ValidationLoader
from iwm.downstream.study import Evaluated, FrozenEncoders, SharedInputs, Study
from iwm.downstream.tasks import (
    ClassificationTask,
    LabelColumn,
    classes_of,
    scores_of,
    selection_metadata,
    task_metadata,
)
from iwm.packing import copy_to_device
from iwm.training.distributed import DistEnv
from shards.split_part import ALL_IMAGES, SplitPart, TrainingParts


class CachedFeatures:
    """Frozen encoders' features of a column's centre crops, cached on the device in the precision of their computation.

    Every process caches its share of the images. The order of an epoch is sampled from the seed and the epoch's number,
    so the number of a batch is the only state.
    """

    metric = ClassificationTask.metric
    proportion_metrics = ClassificationTask.proportion_metrics

    def __init__(
        self,
        column: LabelColumn,
        encoders: FrozenEncoders,
        *,
        batch_size: int,
        label_smoothing: float,
        seed: int,
        dist: DistEnv,
        loading: dict[str, Any],
        bf16: bool,
        interpolation: Interpolation = "linear",
        parts: TrainingParts = ALL_IMAGES,
    ) -> None:
        """Compute the features of both splits. label_smoothing: 0 to 1. interpolation: that of the resize.

        The other arguments and the errors are those of ClassificationTask.
        """
        self.name, self.classes = column.name, classes_of(column, dist)
        self.dist = dist
        self._column, self._seed, self._label_smoothing = column, seed, label_smoothing
        self._batch_size = batch_size

        def compute(split: str, part: SplitPart | None = None) -> tuple[SharedInputs, Int64[Tensor, " n"]]:
            loader = ValidationLoader(
                column.shards,
                split,
                size=column.size,
                batch_size=batch_size,
                label=column.label,
                interpolation=interpolation,
                part=part,
                **loading,
            )
            with torch.autocast(dist.device.type, torch.bfloat16, enabled=bf16):
                return _compute_features(encoders, loader, f"features of {split}", show_progress=dist.is_main)

        self._features, self._labels = compute(column.train, parts.training)
        self._held_out = {"val": compute(column.val)}
        if parts.selection is not None:
            self._held_out["selection"] = compute(column.train, parts.selection)
        self._images = int(dist.sum(torch.tensor(float(len(self._labels)), device=dist.device)).item())
        self._orders: dict[int, Int64[Tensor, " n"]] = {}
        """Orders of the epochs that the last batch is part of."""
        self.evaluated = selection_metadata(parts)

    @property
    def images(self) -> int:
        return self._images

    def get_batch(self, pass_index: int) -> tuple[SharedInputs, Tensor]:
        # Batches continue from one epoch's order into the next, so that all batches have the same size.
        count, size = len(self._labels), self._batch_size
        first = pass_index * size
        epochs = range(first // count, (first + size - 1) // count + 1)
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in epochs}
        pieces = [
            order[max(first - epoch * count, 0) : first + size - epoch * count] for epoch, order in self._orders.items()
        ]
        chosen = torch.cat(pieces)
        targets = mixup_target(self._labels[chosen], len(self.classes.names), smoothing=self._label_smoothing)
        return {name: tokens[chosen] for name, tokens in self._features.items()}, targets

    def _order(self, epoch: int) -> Int64[Tensor, " n"]:
        """Return the order of an epoch, on the device."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, self.dist.rank, epoch, bits=63))
        return copy_to_device(torch.randperm(len(self._labels), generator=generator), self._labels.device)

    def state(self) -> dict[str, Any]:
        return {}

    def evaluate(
        self, study: Study, task_index: int, trials: Sequence[int], images: Evaluated = "val"
    ) -> list[dict[str, float]]:
        features, labels = self._held_out[images]
        batches = (
            ({name: tokens[indices] for name, tokens in features.items()}, labels[indices])
            for indices in torch.arange(len(labels), device=labels.device).split(self._batch_size)
        )
        return scores_of(self, study, task_index, trials, images, batches)

    def metadata(self) -> dict[str, Any]:
        return task_metadata(self._column, self.classes, self.images) | self.evaluated


def _compute_features(
    encoders: FrozenEncoders, loader: ValidationLoader, title: str, show_progress: bool
) -> tuple[SharedInputs, Int64[Tensor, " n"]]:
    # Buffers for all images are allocated first: concatenating batches at the end would need the memory twice.
    buffers: dict[str, Tensor] = {}
    seen = 0
    for batch in track(loader, title, transient=True, disable=not show_progress):
        assert batch.labels is not None  # the loader was given a label column
        shared = encoders(batch.images)
        # Under autocast features are only as exact as bfloat16, which needs half of the memory.
        half = torch.is_autocast_enabled(batch.images.device.type)
        features = {name: shared[name].bfloat16() if half else shared[name] for name in encoders.names}
        for name, values in {**features, "labels": batch.labels}.items():
            if name not in buffers:
                buffers[name] = values.new_empty((loader.samples, *values.shape[1:]))
            buffers[name][seen : seen + len(values)] = values
        seen += len(batch.labels)
    return {name: buffers[name] for name in encoders.names}, buffers["labels"]

"""Features computed once and kept, where no augmentation makes them new: training of heads alone, many times faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from rich.progress import track
from timm.data.mixup import mixup_target
from torch import Tensor

from dali_pipelines.loader import ValidationLoader
from iwm.downstream.classification import Classification, Column, accuracies, classes_of, described
from iwm.downstream.study import FrozenEncoders, Shared, Study, torch_seed
from iwm.packing import to_device
from iwm.training.distributed import World


class KeptFeatures:
    """The frozen encoders' features of centre crops of a column, on the device, in the precision they were computed in.

    Every process keeps its own share of the images. Orders are drawn from the seed and the epoch's number, so that a
    batch's number is all that is needed to go on.
    """

    metric = Classification.metric
    counted = Classification.counted

    def __init__(
        self,
        column: Column,
        encoders: FrozenEncoders,
        *,
        batch_size: int,
        smoothing: float,
        seed: int,
        here: World,
        loading: dict[str, Any],
        bf16: bool,
    ) -> None:
        """smoothing: of labels, 0 to 1. loading: as Classification, and the same errors."""
        self.name, self.classes = column.name, classes_of(column, here)
        self._column, self._here, self._seed, self._smoothing = column, here, seed, smoothing
        self._batch_size = batch_size

        def computed(split: str) -> tuple[Shared, Int64[Tensor, " n"]]:
            loader = ValidationLoader(
                column.shards, split, size=column.size, batch_size=batch_size, label=column.label, **loading
            )
            with torch.autocast(here.device.type, torch.bfloat16, enabled=bf16):
                return _computed(encoders, loader, f"features of {split}", shown=here.main)

        self._known, self._labels = computed(column.train)
        self._held_out = computed(column.val)
        self._images = int(here.sum(torch.tensor(float(len(self._labels)), device=here.device)).item())
        self._orders: dict[int, Int64[Tensor, " n"]] = {}
        """Of the epochs that the last batch was of."""
        self._judged: dict[str, Any] = {}

    @property
    def images(self) -> int:
        return self._images

    def batch(self, number: int) -> tuple[Shared, Tensor]:
        # Batches of a process run through one endless row of its epochs' orders, so that all are of one size.
        count, size = len(self._labels), self._batch_size
        first = number * size
        epochs = range(first // count, (first + size - 1) // count + 1)
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in epochs}
        pieces = [
            order[max(first - epoch * count, 0) : first + size - epoch * count] for epoch, order in self._orders.items()
        ]
        chosen = torch.cat(pieces)
        targets = mixup_target(self._labels[chosen], len(self.classes.names), smoothing=self._smoothing)
        return {name: tokens[chosen] for name, tokens in self._known.items()}, targets

    def _order(self, epoch: int) -> Int64[Tensor, " n"]:
        """On the device."""
        generator = torch.Generator().manual_seed(torch_seed(self._seed, self._here.rank, epoch))
        return to_device(torch.randperm(len(self._labels), generator=generator), self._labels.device)

    def state(self) -> dict[str, Any]:
        return {}

    def judge(self, study: Study, number: int, arms: Sequence[int]) -> list[dict[str, float]]:
        features, labels = self._held_out
        parts = (
            ({name: tokens[places] for name, tokens in features.items()}, labels[places])
            for places in torch.arange(len(labels), device=labels.device).split(self._batch_size)
        )
        scores, self._judged = accuracies(study, number, arms, parts, self.classes, self._here)
        return scores

    def facts(self) -> dict[str, Any]:
        return described(self._column, self.classes, self.images) | self._judged


def _computed(
    encoders: FrozenEncoders, loader: ValidationLoader, title: str, shown: bool
) -> tuple[Shared, Int64[Tensor, " n"]]:
    # Room for all images at once: kept apart and put together at the end, they would for a moment be there twice.
    whole: dict[str, Tensor] = {}
    seen = 0
    for batch in track(loader, title, transient=True, disable=not shown):
        assert batch.labels is not None  # the loader was given a label column
        shared = encoders(batch.images)
        # Under autocast features are no more exact than this, and take half of the memory.
        half = torch.is_autocast_enabled(batch.images.device.type)
        found = {name: shared[name].bfloat16() if half else shared[name] for name in encoders.names}
        for name, values in {**found, "labels": batch.labels}.items():
            if name not in whole:
                whole[name] = values.new_empty((loader.samples, *values.shape[1:]))
            whole[name][seen : seen + len(values)] = values
        seen += len(batch.labels)
    return {name: whole[name] for name in encoders.names}, whole["labels"]

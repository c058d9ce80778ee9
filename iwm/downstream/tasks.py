"""Classification tasks: a label column with augmented crops or cached features, and held-out images (paper, A.2).

Cached features are computed once, from centre crops. Training of heads is then many times faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64, Int64
from rich.progress import track
from timm.data.mixup import mixup_target
from torch import Tensor

from dali_pipelines.crops import CropSettings
from dali_pipelines.loader import CropLoader
from dali_pipelines.seeds import derive_seed
from dali_pipelines.validation_loader import ValidationLoader
from iwm.downstream.mixup import apply_mixup
from iwm.downstream.settings import MixupSettings
from iwm.downstream.study import FrozenEncoders, SharedInputs, Study
from iwm.evaluation.features import match_classes
from iwm.packing import copy_to_device
from iwm.training.distributed import DistEnv
from shards.cache import location_of

TOP_K = (1, 5)
"""Values of k for top-k accuracy."""


@dataclass(frozen=True)
class LabelColumn:
    """Label column of shards, with a training split and a held-out split."""

    name: str
    """Name of the task."""
    shards: Path
    train: str
    val: str
    label: str
    size: int
    """Side of the held-out centre crops (pixels)."""
    option: str = "--data.label"
    """Option that names the column."""


class Classes(NamedTuple):
    """Class names and the class numbers of the held-out split."""

    names: list[str]
    """Class names of the training split, by number."""
    train_index: Int64[Tensor, " v"]
    """Index in `names` of each class of the held-out split; -1 for a class that is not in the training split."""


def classes_of(column: LabelColumn, dist: DistEnv) -> Classes:
    """Return the classes of a column. Raises ConfigError, naming the option, for a split that does not exist, and where
    the splits lack the column or have no common class."""
    names, train_index = match_classes(
        column.shards, column.train, column.val, column.label, "--data.train", column.option
    )
    return Classes(names, train_index.to(dist.device))


class ClassificationTask:
    """Label column with augmented crops, which are sampled in every epoch."""

    metric = "top1"
    proportion_metrics: tuple[str, ...] = tuple(f"top{rank}" for rank in TOP_K)

    def __init__(
        self,
        column: LabelColumn,
        crops: CropSettings,
        mixing: MixupSettings,
        *,
        batch_size: int,
        seed: int,
        dist: DistEnv,
        loading: dict[str, Any],
        state: dict[str, Any] | None = None,
    ) -> None:
        """Open the loaders.

        batch_size: images of a pass of this process. loading: arguments of all loaders (context.loading_of). Raises
        ShardError, ConfigError, and LoaderStateError for a state of other data.
        """
        self.name, self.classes = column.name, classes_of(column, dist)
        self._column, self._dist, self._seed, self._mixing = column, dist, seed, mixing
        loading = {**loading, "label": column.label}
        self._loader = CropLoader(
            column.shards, column.train, crops, batch_size=batch_size, seed=seed, state=state, **loading
        )
        self._held_out = ValidationLoader(column.shards, column.val, size=column.size, batch_size=batch_size, **loading)
        self._evaluated: dict[str, Any] = {}

    @property
    def images(self) -> int:
        return self._loader.samples_per_epoch

    def get_batch(self, pass_index: int) -> tuple[Tensor, Tensor]:
        images, labels, _ = next(self._loader)
        chosen = {"seed": self._seed, "pass_index": pass_index, "rank": self._dist.rank}
        return apply_mixup(images, labels, len(self.classes.names), self._mixing, **chosen)

    def state(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def evaluate(self, study: Study, task_index: int, trials: Sequence[int]) -> list[dict[str, float]]:
        held_out = ((batch.images, batch.labels) for batch in self._held_out if batch.labels is not None)
        scores, self._evaluated = accuracies(study, task_index, trials, held_out, self.classes, self._dist)
        return scores

    def metadata(self) -> dict[str, Any]:
        return task_metadata(self._column, self.classes, self.images) | self._evaluated


def task_metadata(column: LabelColumn, classes: Classes, train_images: int) -> dict[str, Any]:
    """Return the entries of a result that describe a column."""
    return {
        "shards": location_of(column.shards),
        "train": column.train,
        "split": column.val,
        "label": column.label,
        "classes": len(classes.names),
        "train_images": train_images,
    }


def accuracies(
    study: Study,
    task_index: int,
    trials: Sequence[int],
    held_out: Iterable[tuple[Tensor | SharedInputs, Tensor]],
    classes: Classes,
    dist: DistEnv,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Return top1 and top5 (0 to 1) of each trial over all processes' held-out images, and their number and chance.

    Chance is the share of the majority class: the accuracy of always predicting it.
    """
    correct: Float64[Tensor, "a 2"] = torch.zeros(len(trials), len(TOP_K), dtype=torch.float64, device=dist.device)
    seen: Float64[Tensor, " c"] = torch.zeros(len(classes.train_index), dtype=torch.float64, device=dist.device)
    full_size = 0
    for inputs, labels in held_out:
        truths = classes.train_index[labels]
        seen.index_add_(0, labels, torch.ones_like(labels, dtype=seen.dtype))
        full_size = max(full_size, len(labels))
        # The last batch, which is smaller, is not compiled separately.
        with nullcontext() if len(labels) == full_size else torch.compiler.set_stance("force_eager"):
            predictions = study.predict(inputs, task_index, trials)
        for row, logits in zip(correct, predictions, strict=True):
            hits = logits.topk(min(TOP_K[-1], logits.shape[1]), dim=1).indices == truths[:, None]
            row += torch.stack([hits[:, :rank].sum() for rank in TOP_K])
    counts = dist.sum(torch.cat((correct.flatten(), seen))).cpu()
    correct, seen = counts[: correct.numel()].view_as(correct), counts[correct.numel() :]
    images = seen.sum()
    shares = (correct / images).tolist()
    return (
        [{f"top{rank}": share for rank, share in zip(TOP_K, row, strict=True)} for row in shares],
        {"val_images": int(images), "chance": (seen.max() / images).item()},
    )


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
    ) -> None:
        """Compute the features of both splits. label_smoothing: 0 to 1.

        The other arguments and the errors are those of ClassificationTask.
        """
        self.name, self.classes = column.name, classes_of(column, dist)
        self._column, self._dist, self._seed, self._label_smoothing = column, dist, seed, label_smoothing
        self._batch_size = batch_size

        def compute(split: str) -> tuple[SharedInputs, Int64[Tensor, " n"]]:
            loader = ValidationLoader(
                column.shards, split, size=column.size, batch_size=batch_size, label=column.label, **loading
            )
            with torch.autocast(dist.device.type, torch.bfloat16, enabled=bf16):
                return _compute_features(encoders, loader, f"features of {split}", show_progress=dist.is_main)

        self._features, self._labels = compute(column.train)
        self._held_out = compute(column.val)
        self._images = int(dist.sum(torch.tensor(float(len(self._labels)), device=dist.device)).item())
        self._orders: dict[int, Int64[Tensor, " n"]] = {}
        """Orders of the epochs that the last batch is part of."""
        self._evaluated: dict[str, Any] = {}

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
        generator = torch.Generator().manual_seed(derive_seed(self._seed, self._dist.rank, epoch, bits=63))
        return copy_to_device(torch.randperm(len(self._labels), generator=generator), self._labels.device)

    def state(self) -> dict[str, Any]:
        return {}

    def evaluate(self, study: Study, task_index: int, trials: Sequence[int]) -> list[dict[str, float]]:
        features, labels = self._held_out
        parts = (
            ({name: tokens[indices] for name, tokens in features.items()}, labels[indices])
            for indices in torch.arange(len(labels), device=labels.device).split(self._batch_size)
        )
        scores, self._evaluated = accuracies(study, task_index, trials, parts, self.classes, self._dist)
        return scores

    def metadata(self) -> dict[str, Any]:
        return task_metadata(self._column, self.classes, self.images) | self._evaluated


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

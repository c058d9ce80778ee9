"""Classification tasks: a label column with augmented crops, and held-out images (paper, A.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from dali_pipelines.crops import CropSettings
from dali_pipelines.loader import CropLoader
from dali_pipelines.validation_loader import ValidationLoader
from iwm.downstream.mixup import apply_mixup
from iwm.downstream.settings import MixupSettings
from iwm.downstream.study import Evaluated, SharedInputs, Study
from iwm.evaluation.features import match_classes
from iwm.training.distributed import DistEnv
from shards.cache import location_of
from shards.split_part import ALL_IMAGES, TrainingParts

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


class LabelledTask(Protocol):
    """Task of one label column."""

    classes: Classes
    dist: DistEnv
    evaluated: dict[str, Any]
    """Entries of a result on the images that trials are evaluated on."""


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
        parts: TrainingParts = ALL_IMAGES,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Open the loaders. Held-out images are resized with the interpolation of the crops.

        batch_size: images of a pass of this process. loading: arguments of all loaders (context.loading_of). parts:
        those of the training split. Raises ShardError, ConfigError, and LoaderStateError for a state of other data.
        """
        self.name, self.classes = column.name, classes_of(column, dist)
        self.dist = dist
        self._column, self._seed, self._mixing = column, seed, mixing
        loading = {**loading, "label": column.label}
        self._loader = CropLoader(
            column.shards,
            column.train,
            crops,
            batch_size=batch_size,
            seed=seed,
            part=parts.training,
            state=state,
            **loading,
        )
        loading |= {"size": column.size, "batch_size": batch_size, "interpolation": crops.interpolation}
        self._held_out = {"val": ValidationLoader(column.shards, column.val, **loading)}
        if parts.selection is not None:
            self._held_out["selection"] = ValidationLoader(column.shards, column.train, part=parts.selection, **loading)
        self.evaluated = selection_metadata(parts)

    @property
    def images(self) -> int:
        return self._loader.samples_per_epoch

    def get_batch(self, pass_index: int) -> tuple[Tensor, Tensor]:
        images, labels, _ = next(self._loader)
        chosen = {"seed": self._seed, "pass_index": pass_index, "rank": self.dist.rank}
        return apply_mixup(images, labels, len(self.classes.names), self._mixing, **chosen)

    def state(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def evaluate(
        self, study: Study, task_index: int, trials: Sequence[int], images: Evaluated = "val"
    ) -> list[dict[str, float]]:
        held_out = ((batch.images, batch.labels) for batch in self._held_out[images] if batch.labels is not None)
        return scores_of(self, study, task_index, trials, images, held_out)

    def metadata(self) -> dict[str, Any]:
        return task_metadata(self._column, self.classes, self.images) | self.evaluated


def selection_metadata(parts: TrainingParts) -> dict[str, Any]:
    """Return the entry of a result on the training images that are held out for the choice, if there are any."""
    return {} if parts.selection is None else {"selection_images": parts.selection.held_out}


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


def scores_of(
    task: LabelledTask,
    study: Study,
    task_index: int,
    trials: Sequence[int],
    images: Evaluated,
    held_out: Iterable[tuple[Tensor | SharedInputs, Tensor]],
) -> list[dict[str, float]]:
    """Return the accuracies of the trials, and store what a result says of the images of the held-out split."""
    classes = task.classes
    if images == "selection":
        classes = Classes(classes.names, torch.arange(len(classes.names), device=classes.train_index.device))
    scores, evaluated = accuracies(study, task_index, trials, held_out, classes, task.dist)
    if images == "val":
        task.evaluated |= evaluated
    return scores


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

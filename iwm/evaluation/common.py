"""Common parts of all evaluators: the loaded model, its images, standard errors.

Images are clean views in the order of the shards. Shards are shuffled when they are made, so the first images are a
random sample. Standard errors are over images, the independent units of every evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dali_pipelines.validation_loader import ValidationBatch, ValidationLoader
from iwm.config import Config, ConfigError
from iwm.evaluation.held_out import EvalSplit, choose_split, require_images
from iwm.evaluation.settings import EvalSettings
from iwm.models.world_model import WorldModel
from iwm.training.checkpoint import load_world_model, resolve, run_dir_of
from iwm.training.runtime import device_name, select_device

RANDOM_POOL_SIZE = 256
"""Number of images that random images are sampled from (all, if there are fewer)."""


@dataclass(frozen=True)
class EvalContext:
    """Loaded model and location of its images."""

    model: WorldModel
    config: Config
    run: Path
    """Run folder, which evaluation files are written to."""
    checkpoint: Path
    """Checkpoint file that was loaded."""
    data: EvalSplit
    device: torch.device
    notes: list[str] = field(default_factory=list)
    """Remarks on this evaluation, for terminal, JSON and page: fewer images than requested."""

    @property
    def device_name(self) -> str:
        """Name of the device, for the JSON result."""
        return device_name(self.device)

    def first_images(self, most: int, at_least: int = 1) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
        """Return the first `most` images as clean views on the device, with their sample keys; all if there are fewer.

        A note says so. Raises MissingDataError where the split has fewer than `at_least`.
        """
        images, keys = self.read_images(most)
        require_images(len(keys), at_least, self.data.shards, self.data.split)
        self.note_fewer(len(keys), most, self.data.split)
        return images, keys

    def random_images(self, count: int, generator: torch.Generator) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
        """Sample `count` of the first max(RANDOM_POOL_SIZE, count) images; return them with their sample keys.

        All if there are fewer, with a note.
        """
        images, keys = self.read_images(max(RANDOM_POOL_SIZE, count))
        self.note_fewer(len(keys), count, self.data.split)
        order = torch.randperm(len(images), generator=generator)[:count]
        return images[order.to(images.device)], [keys[i] for i in order.tolist()]

    def read_images(self, most: int) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
        """Return at most `most` images as clean views on the device, with their sample keys."""
        data, size = self.data, self.config.views.size
        return first_images(data.shards, data.split, size=size, most=most, device=self.device)

    def note_fewer(self, found: int, most: int | None, split: str, kind: str = "images") -> None:
        """Add a note where a split has fewer images than the `most` that are used (None: all are used)."""
        if most is not None and found < most:
            self.notes.append(f"{found} of at most {most} {kind}: split '{split}' has no more")

    def images_of(self, keys: Sequence[str]) -> UInt8[Tensor, "b h w 3"]:
        """Return the images of these sample keys, in this order. Raises ConfigError for a missing key."""
        return images_of(self.data.shards, self.data.split, keys, size=self.config.views.size, device=self.device)

    def iter_labelled(self, split: str, label: str, most: int | None) -> Iterator[ValidationBatch]:
        """Iterate over the first `most` images of a split (None: all) with their labels, in batches (iter_batches)."""
        size, shards = self.config.views.size, self.data.shards
        return iter_batches(shards, split, size=size, device=self.device, most=most, label=label)


def load_eval_context(settings: EvalSettings) -> EvalContext:
    """Load the checkpoint and choose its images. Raises the errors of load_world_model and choose_split."""
    device = select_device(settings.device, "--device")
    checkpoint = resolve(settings.checkpoint)
    model, config = load_world_model(checkpoint, device)
    data = choose_split(settings.data, config.data, checkpoint)
    return EvalContext(model, config, run_dir_of(checkpoint), checkpoint, data, device)


READ_BATCH_SIZE = 64
"""Images read at a time."""


def iter_batches(
    folder: Path,
    split: str,
    *,
    size: int,
    device: torch.device,
    most: int | None = None,
    label: str | None = None,
) -> Iterator[ValidationBatch]:
    """Iterate over the first `most` images of a split (None: all) in batches, with the labels of column `label`.

    A batch is valid until the next one is read, because it is a view of the pipeline's memory: clone it to retain it.
    Raises the ShardError of ValidationLoader.
    """
    batch_size = READ_BATCH_SIZE if most is None else min(most, READ_BATCH_SIZE)
    remaining = most
    for batch in ValidationLoader(folder, split, size=size, batch_size=batch_size, device=device, label=label):
        images, labels, keys = batch
        yield (
            batch
            if remaining is None
            else ValidationBatch(images[:remaining], None if labels is None else labels[:remaining], keys[:remaining])
        )
        if remaining is not None:
            remaining -= len(images)
            if remaining <= 0:
                return


def first_images(
    folder: Path, split: str, *, size: int, most: int, device: torch.device
) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
    """Return at most `most` images of a split on `device`, size×size, with their sample keys."""
    images: list[Tensor] = []
    keys: list[str] = []
    for batch in iter_batches(folder, split, size=size, most=most, device=device):
        images.append(batch.images.clone())
        keys += batch.keys
    return torch.cat(images), keys


def images_of(
    folder: Path, split: str, keys: Sequence[str], *, size: int, device: torch.device
) -> UInt8[Tensor, "b h w 3"]:
    """Return the images of these sample keys, in this order; the split is read until all are found.

    Raises ConfigError, which names the keys that the split does not have.
    """
    found: dict[str, Tensor] = {}
    requested = set(keys)
    for batch in iter_batches(folder, split, size=size, device=device):
        found |= {key: image.clone() for key, image in zip(batch.keys, batch.images, strict=True) if key in requested}
        if len(found) == len(requested):
            return torch.stack([found[key] for key in keys])
    missing = ", ".join(key for key in keys if key not in found)
    raise ConfigError(f"--keys: split '{split}' of {folder} has no {missing}; use sample names of its tar files")


def mean_and_stderr(values: Float[Tensor, " images"]) -> dict[str, float]:
    """Return `mean` and `standard_error` of one value per image (the error is NaN for a single image)."""
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else torch.nan
    return {"mean": values.mean().item(), "standard_error": error}


Share = TypeVar("Share", float, Tensor)


def proportion_stderr(share: Share, count: int) -> Share:
    """Return the binomial standard error of a share of `count` images."""
    error: Share = (share * (1 - share) / count) ** 0.5
    return error

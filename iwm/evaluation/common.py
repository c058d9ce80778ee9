"""Common parts of all evaluators: the loaded model, held-out images, standard errors.

Images are clean views in the order of the shards. Shards are shuffled when they are made, so the first images are a
random sample. Standard errors are over images, the independent units of every evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dali_pipelines.validation_loader import ValidationBatch, ValidationLoader
from iwm.config import Config, ConfigError
from iwm.evaluation.settings import EvalSettings
from iwm.models.world_model import WorldModel
from iwm.training.checkpoint import load_world_model, resolve, run_dir_of
from iwm.training.runtime import device_name, select_device

RANDOM_POOL_SIZE = 256
"""Number of held-out images that random images are sampled from (all, if there are fewer)."""


@dataclass(frozen=True)
class EvalContext:
    """Loaded model and location of its held-out images."""

    model: WorldModel
    config: Config
    run: Path
    """Run folder, which evaluation files are written to."""
    checkpoint: Path
    """Checkpoint file that was loaded."""
    shards: Path
    split: str
    device: torch.device

    @property
    def device_name(self) -> str:
        """Name of the device, for the JSON result."""
        return device_name(self.device)

    def first_images(
        self, most: int, at_least: int | None = None, option: str = "--bank.num-images"
    ) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
        """Return the first `most` held-out images as clean views on the device, with their sample keys.

        Raises ConfigError, which names `option`, where the split has fewer than `at_least` (default: `most`).
        """
        images, keys = first_images(self.shards, self.split, size=self.config.views.size, most=most, device=self.device)
        if len(keys) < (at_least or most):
            raise ConfigError(
                f"{self.shards}: split '{self.split}' has {len(keys)} images, {at_least or most} are required; "
                f"lower {option}"
            )
        return images, keys

    def random_images(
        self, count: int, generator: torch.Generator, option: str = "--bank.num-images"
    ) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
        """Sample `count` of the first max(RANDOM_POOL_SIZE, count) held-out images; return them with their sample keys.

        Raises ConfigError, which names `option`, where the split has fewer than `count`.
        """
        images, keys = self.first_images(max(RANDOM_POOL_SIZE, count), at_least=count, option=option)
        order = torch.randperm(len(images), generator=generator)[:count]
        return images[order.to(images.device)], [keys[i] for i in order.tolist()]

    def images_of(self, keys: Sequence[str]) -> UInt8[Tensor, "b h w 3"]:
        """Return the held-out images of these sample keys, in this order. Raises ConfigError for a missing key."""
        return images_of(self.shards, self.split, keys, size=self.config.views.size, device=self.device)

    def iter_labelled(self, split: str, label: str, most: int | None) -> Iterator[ValidationBatch]:
        """Iterate over the first `most` images of a split (None: all) with their labels, in batches (iter_batches)."""
        return iter_batches(self.shards, split, size=self.config.views.size, device=self.device, most=most, label=label)


def load_eval_context(settings: EvalSettings) -> EvalContext:
    """Load the checkpoint and resolve its data. Raises ConfigError and the errors of load_world_model."""
    device = select_device(settings.device, "--device")
    checkpoint = resolve(settings.checkpoint)
    model, config = load_world_model(checkpoint, device)
    split = settings.data.split or config.data.val
    if split is None:
        raise ConfigError(f"{settings.checkpoint}: the run has no validation split (data.val); use --data.split NAME")
    shards = settings.data.shards or config.data.shards
    return EvalContext(model, config, run_dir_of(checkpoint), checkpoint, shards, split, device)


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
    return {"mean": values.mean().item(), "standard_error": (values.std() / len(values) ** 0.5).item()}


Share = TypeVar("Share", float, Tensor)


def proportion_stderr(share: Share, count: int) -> Share:
    """Return the binomial standard error of a share of `count` images."""
    error: Share = (share * (1 - share) / count) ** 0.5
    return error

"""Training loaders: endless, exactly resumable batches of a split as torch tensors.

validation_loader.py has the loaders of one ordered pass.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dali_pipelines.augmentations import ViewBackend
from dali_pipelines.crops import CropSettings, SegmentationCrops
from dali_pipelines.dali import dali_version
from dali_pipelines.decoder import DECODER, Decoder
from dali_pipelines.outputs import (
    SampleKeys,
    backend_of,
    build_pipeline,
    parse_labels,
    pipeline_options,
    run_pipeline,
)
from dali_pipelines.photometric_kernels import apply_views
from dali_pipelines.pipelines import labelled_crops, segmentation_crops, two_views
from dali_pipelines.reader import open_source
from dali_pipelines.seeds import derive_seed
from dali_pipelines.staging import stage
from dali_pipelines.views import Views
from shards.cache import SplitCache
from shards.errors import UserError
from shards.split_part import SplitPart

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


SettingsT = TypeVar("SettingsT", bound="DataclassInstance")
"""Dataclass with the settings of the samples, e.g. Views."""


class Batch(Protocol):
    """Batch with the keys of its samples."""

    @property
    def keys(self) -> SampleKeys: ...


BatchT = TypeVar("BatchT", bound=Batch)
"""Type of a batch, e.g. ViewBatch."""


class LoaderStateError(UserError):
    """A saved state of a loader with other settings. The message names the differences.

    `different` holds their names: `shards` for other data, `world_size` for another number of ranks, and so on.
    """

    def __init__(self, message: str, different: set[str]) -> None:
        super().__init__(message)
        self.different = different


class ResumableLoader(ABC, Generic[SettingsT, BatchT]):
    """Endless batches of a split, reshuffled each epoch. A subclass defines the pipeline and the batches.

    Each rank samples its own augmentations; all ranks use the same order of the tars. An epoch has `batches_per_epoch`
    batches on every rank, and each sample once, on one rank. Where the numbers do not divide evenly, the rank's last
    sample is repeated (with new augmentations) to pad its last batch, and one more batch where another rank has one
    more. This gives batches_per_epoch · batch_size · world_size - samples_per_epoch repetitions over all ranks.

    Raises ShardError where the shards differ from their manifest, lack the requested label column or masks, or are
    fewer than the ranks, and LoaderStateError where `state` has other settings. `next` raises ShardError where an image
    cannot be read.
    """

    pipeline: Callable[..., Any]
    """Function (a staticmethod) that makes the DALI pipeline from a source, the settings and keywords of `__init__`."""
    settings_name: str
    """Name of the settings in a saved state and a LoaderStateError."""
    masks = False
    """True where each sample's segmentation mask is read with its image."""
    graph: Mapping[str, Any] = {}
    """Further keywords of `pipeline`, which are part of a saved state."""

    def __init__(
        self,
        folder: Path,
        split: str,
        settings: SettingsT,
        *,
        batch_size: int,
        seed: int,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 4,
        prefetch_queue_depth: int = 2,
        label: str | None = None,
        part: SplitPart | None = None,
        shuffle_buffer: int = 2048,
        decoder: Decoder = DECODER,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Open the shards and build the pipeline.

        `part`: part of the split; None: all of it. `shuffle_buffer`: number of encoded images in the buffer that
        samples are drawn from. `decoder`: for GPUs.
        """
        options = pipeline_options(
            device,
            batch_size=batch_size,
            num_threads=num_threads,
            prefetch_queue_depth=prefetch_queue_depth,
            decoder=decoder,
        )
        source = open_source(folder, split, label=label, masks=self.masks, rank=rank, world_size=world_size, part=part)
        self.samples_per_epoch = source.total
        self.batches_per_epoch = source.batches_per_epoch(batch_size)
        self._source = source
        self._identity = {
            "shards": source.fingerprint,
            "split": split,
            self.settings_name: asdict(settings),
            "batch_size": batch_size,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "label": label,
            "shuffle_buffer": shuffle_buffer,
            "device": options["backend"],
            "decoder": decoder.device if options["backend"] == "gpu" else "cpu",
            "dali": dali_version,
            **self.graph,
        }
        checkpoint = None if state is None else self._check_state(state)
        self._batches: int = state.get("batches", 0) if state else 0
        order = {"shuffle_buffer": min(shuffle_buffer, source.samples), "shuffle_seed": derive_seed(seed)}
        self._staged = stage(
            source, **order, batch_size=batch_size, prefetch=prefetch_queue_depth, batches=self._batches
        )
        if self._staged:
            weakref.finalize(self, self._staged.stop)
            self._staged.wait_for(self._batches)
        self._pipeline = self.pipeline(
            source,
            settings,
            **order,
            seed=derive_seed(seed, rank),
            checkpoint=checkpoint,
            **{**options, **self.graph},
        )
        build_pipeline(self._pipeline, folder)

    @abstractmethod
    def batch(self, outputs: list[Tensor]) -> BatchT:
        """Convert the pipeline's outputs to a batch."""

    def __iter__(self) -> Iterator[BatchT]:
        return self

    def __next__(self) -> BatchT:
        if self._staged:
            self._staged.wait_for(self._batches)
        batch = self.batch(run_pipeline(self._pipeline, self._source.folder))
        if self._staged:
            self._staged.check(batch.keys.tars())
        self._batches += 1
        return batch

    @property
    def cache(self) -> SplitCache | None:
        """Cache to which the shards are copied as they are needed; None unless they are at a URL."""
        return self._source.cache

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume with the batch after the last one returned: plain values and bytes (3 KB)."""
        return {**self._identity, "batches": self._batches, "pipeline": self._pipeline.checkpoint()}

    def _check_state(self, state: dict[str, Any]) -> bytes:
        """Return the pipeline's part of `state`. Raise LoaderStateError where its settings differ from this loader's.

        DALI itself does not check this, and would continue with other samples without an error.
        """
        # States of older versions have no decoder. On a CPU their graph is the same; DALI refuses those of a GPU.
        before = {"decoder": "cpu", **state} if state.get("device") == "cpu" else state
        different = {name: now for name, now in self._identity.items() if before.get(name) != now}
        if different:
            changes = "; ".join(f"{name} was {before.get(name)!r}, is {now!r}" for name, now in different.items())
            raise LoaderStateError(
                f"the saved state of the data loader belongs to other settings: {changes}. "
                "Use the same settings to continue mid-epoch, or start a new epoch without the saved state",
                set(different),
            )
        if self._source.cache and "batches" not in state:
            raise LoaderStateError(
                "the saved state of the data loader is that of an older version, which did not count batches: shards "
                "at a URL cannot be staged for it. Continue on a local folder, or start a new epoch without the state",
                {"batches"},
            )
        pipeline: bytes = state["pipeline"]
        return pipeline


class ViewBatch(NamedTuple):
    """Two views of each image, on the pipeline's device, in DALI's memory (reused once the tensors are gone).

    Views of backend `triton` are in torch's memory.
    """

    source: UInt8[Tensor, "b h w 3"]
    target: UInt8[Tensor, "b h w 3"]
    params: Float[Tensor, "b p"]
    """Sampled parameters, in the order of augmentations.PARAMS."""
    label: Int64[Tensor, " b"] | None
    """Class indices; None where the loader has no label column."""
    keys: SampleKeys

    def clone(self) -> ViewBatch:
        """Return a copy of the batch whose views and params have their own memory."""
        return self._replace(source=self.source.clone(), target=self.target.clone(), params=self.params.clone())


class ViewLoader(ResumableLoader[Views, ViewBatch]):
    """Endless batches of two views, for pretraining."""

    pipeline = staticmethod(two_views)
    settings_name = "views"

    def __init__(
        self, folder: Path, split: str, settings: Views, *, backend: ViewBackend | None = None, **options: Any
    ) -> None:
        """Open the shards and build the pipeline.

        `backend`: implementation of the views; it does not affect params. None: all in DALI on `device`. `options`:
        keywords of ResumableLoader.
        """
        self._views = settings
        self.backend: ViewBackend = backend or backend_of(options.get("device", "cpu"))[0]
        self.graph = {"backend": self.backend}
        super().__init__(folder, split, settings, **options)

    def batch(self, outputs: list[Tensor]) -> ViewBatch:
        if self.backend == "triton":
            params, crops, *rest = outputs
            source, target = apply_views(crops, params, self._views)
        else:
            params, source, target, *rest = outputs
        source_info, *codes = rest
        keys = SampleKeys(source_info)
        label = parse_labels(codes[0], keys, self._source).to(params.device, non_blocking=True) if codes else None
        return ViewBatch(source, target, params, label, keys)


class LabelledBatch(NamedTuple):
    """Augmented crops with their classes, on the pipeline's device; images in DALI's memory, as in ViewBatch."""

    images: UInt8[Tensor, "b h w 3"]
    labels: Int64[Tensor, " b"]
    keys: SampleKeys


class CropLoader(ResumableLoader[CropSettings, LabelledBatch]):
    """Endless batches of augmented crops and their classes, for the downstream protocols. Needs `label`."""

    pipeline = staticmethod(labelled_crops)
    settings_name = "crops"

    def batch(self, outputs: list[Tensor]) -> LabelledBatch:
        images, source_info, codes = outputs
        keys = SampleKeys(source_info)
        labels = parse_labels(codes, keys, self._source).to(images.device, non_blocking=True)
        return LabelledBatch(images, labels, keys)


class SegmentationBatch(NamedTuple):
    """Crops with their segmentation masks, on the pipeline's device, in DALI's memory, as in ViewBatch."""

    images: UInt8[Tensor, "b h w 3"]
    masks: UInt8[Tensor, "b h w"]
    """Class ids as in the shards, and SegmentationCrops.ignore_index outside the image."""
    keys: SampleKeys


class SegmentationLoader(ResumableLoader[SegmentationCrops, SegmentationBatch]):
    """Endless batches of crops and their masks, for training of segmentation."""

    pipeline = staticmethod(segmentation_crops)
    settings_name = "crops"
    masks = True

    def batch(self, outputs: list[Tensor]) -> SegmentationBatch:
        images, masks, source_info = outputs
        return SegmentationBatch(images, masks[..., 0], SampleKeys(source_info))

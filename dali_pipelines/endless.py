"""Endless batches of a split, exactly resumable: what the loaders of training have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.dali import dali_version
from dali_pipelines.decoder import GPU_DECODER, GpuDecoder
from dali_pipelines.outputs import backend_of, build, run
from dali_pipelines.reader import open_source

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SettingsT = TypeVar("SettingsT", bound="DataclassInstance")
"""The dataclass that says how samples are made, as Views."""
BatchT = TypeVar("BatchT")


class StateError(ValueError):
    """A loader state that does not belong to the loader it is given to. The message names what differs.

    `different` has the names: of `shards` where the data are others, of `world_size` where only their sharing is, …
    """

    def __init__(self, message: str, different: set[str]) -> None:
        super().__init__(message)
        self.different = different


class EndlessLoader(ABC, Generic[SettingsT, BatchT]):
    """Endless batches of a split, reshuffled each epoch. A subclass says how samples are made.

    Each rank draws its own augmentations; the ranks share one order of the tars. An epoch is `steps_per_epoch` batches
    on every rank and has each sample once, on one rank. Where the counts do not divide, the rank's last sample is
    repeated (with new augmentations) to fill its last batch, and one more batch if another rank has one more:
    steps_per_epoch · batch_size · world_size - samples_per_epoch repetitions over all ranks.

    Raises ShardError where the shards are not what their manifest says, lack the label column or the masks that are
    asked for, or are fewer than the ranks; StateError where `state` belongs to other settings. `next` raises ShardError
    where an image cannot be read.
    """

    pipeline: Callable[..., Any]
    """The DALI graph (a staticmethod): of a source, the settings and the keywords that `__init__` gives it."""
    settings_name: str
    """What a saved state and a StateError call the settings."""
    masks = False
    """Whether each sample's segmentation mask is read beside its image."""

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
        threads: int = 4,
        prefetch: int = 2,
        label: str | None = None,
        shuffle_buffer: int = 2048,
        decoder: GpuDecoder = GPU_DECODER,
        state: dict[str, Any] | None = None,
    ) -> None:
        """`shuffle_buffer`: encoded images held to draw from; `decoder`: of a GPU."""
        backend, device_id = backend_of(device)
        source = open_source(folder, split, label=label, masks=self.masks, rank=rank, world_size=world_size)
        self.samples_per_epoch = source.manifest.samples
        self.steps_per_epoch = -(-source.most_samples // batch_size)
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
            "device": backend,
            "dali": dali_version,
        }
        self._pipeline = self.pipeline(
            source,
            settings,
            backend=backend,
            shuffle_buffer=min(shuffle_buffer, source.samples),
            order_seed=_seed(seed),
            read_ahead=prefetch,
            decoder=decoder,
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            seed=_seed(seed, rank),
            prefetch_queue_depth=prefetch,
            checkpoint=None if state is None else self._accept(state),
        )
        build(self._pipeline, folder)

    @abstractmethod
    def batch(self, outputs: list[Tensor]) -> BatchT:
        """The pipeline's outputs by name."""

    def __iter__(self) -> Iterator[BatchT]:
        return self

    def __next__(self) -> BatchT:
        return self.batch(run(self._pipeline, self._source.folder))

    def state(self) -> dict[str, Any]:
        """All that is needed to go on with the batch after the last one returned; plain values and bytes (3 KB)."""
        return {**self._identity, "pipeline": self._pipeline.checkpoint()}

    def _accept(self, state: dict[str, Any]) -> bytes:
        """The pipeline's part of `state`. DALI itself would take a foreign one and silently give another stream."""
        different = {name: now for name, now in self._identity.items() if state.get(name) != now}
        if different:
            changes = "; ".join(f"{name} was {state.get(name)!r}, is {now!r}" for name, now in different.items())
            raise StateError(
                f"the saved state of the data loader belongs to other settings: {changes}. "
                "Use the same settings to continue mid-epoch, or start a new epoch without the saved state",
                set(different),
            )
        pipeline: bytes = state["pipeline"]
        return pipeline


def _seed(*parts: int) -> int:
    """One of DALI's 31-bit seeds from several numbers, so that neighbouring seeds and ranks have nothing in common."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)

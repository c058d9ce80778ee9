"""Batches for torch, out of the DALI pipelines: endless two-view batches for training, one ordered pass to validate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dali_pipelines.augmentation import Views
from dali_pipelines.classification import centre_crops
from dali_pipelines.photometric import Backend
from dali_pipelines.reader import GpuDecoder, open_source
from dali_pipelines.views import two_views
from shards.manifest import ShardError

GPU_DECODER = GpuDecoder()
"""DALI's own division of the work, and room for images of up to 2048×2048."""


class SampleKeys(Sequence[str]):
    """The keys of a batch's samples, taken from where the reader found them only when asked for."""

    def __init__(self, origins: UInt8[Tensor, "b n"]) -> None:
        self._origins = origins

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> SampleKeys: ...
    def __getitem__(self, index: int | slice) -> str | SampleKeys:
        if isinstance(index, slice):
            return SampleKeys(self._origins[index])
        origin = self._origins[index].numpy().tobytes().rstrip(b"\0").decode()
        # "tar:offset:KEY.jpg": a key has no dot, and neither it nor the offset has a colon.
        return origin.rpartition(":")[2].partition(".")[0]

    def __len__(self) -> int:
        return len(self._origins)

    def __repr__(self) -> str:
        return f"SampleKeys({list(self)})"


class Batch(NamedTuple):
    """Two views of each image, on the pipeline's device, in DALI's memory: it is reused once the tensors are gone."""

    source: UInt8[Tensor, "b h w 3"]
    target: UInt8[Tensor, "b h w 3"]
    params: Float[Tensor, "b p"]
    """What was done, in the order of augmentation.PARAMS."""
    label: Int64[Tensor, " b"] | None
    """None where the loader was given no label column."""
    keys: SampleKeys


class StateError(ValueError):
    """A loader state that does not belong to the loader it is given to. The message names what differs.

    `different` has the names: of `shards` where the data are others, of `world_size` where only their sharing is, …
    """

    def __init__(self, message: str, different: set[str]) -> None:
        super().__init__(message)
        self.different = different


class ViewLoader:
    """Endless two-view batches of a split, reshuffled each epoch.

    Each rank draws its own augmentations; the ranks share one order of the tars. An epoch is `steps_per_epoch` batches
    on every rank and has each sample once, on one rank. Where the counts do not divide, the rank's last sample is
    repeated (with new augmentations) to fill its last batch, and one more batch if another rank has one more:
    steps_per_epoch · batch_size · world_size - samples_per_epoch repetitions over all ranks.

    Raises ShardError where the shards are not what their manifest says, have no such label column or are fewer than
    the ranks; StateError where `state` belongs to other settings. `next` raises ShardError where an image cannot be
    read.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        views: Views,
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
        backend, device_id = _backend(device)
        source = open_source(folder, split, label=label, rank=rank, world_size=world_size)
        self.samples_per_epoch = source.manifest.samples
        self.steps_per_epoch = -(-source.most_samples // batch_size)
        self._folder = folder
        self._identity = {
            "shards": source.fingerprint,
            "split": split,
            "views": asdict(views),
            "batch_size": batch_size,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "label": label,
            "shuffle_buffer": shuffle_buffer,
            "device": backend,
            "dali": version("nvidia-dali-cuda130"),
        }
        self._pipeline = two_views(
            source,
            views,
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
        self._pipeline.build()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        source, target, params, origins, *codes = _run(self._pipeline, self._folder)
        label = parse_labels(codes[0]).to(params.device, non_blocking=True) if codes else None
        return Batch(source, target, params, label, SampleKeys(origins))

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


class ValidationBatch(NamedTuple):
    """Centre crops of consecutive samples, on the pipeline's device."""

    images: UInt8[Tensor, "b h w 3"]
    labels: Int64[Tensor, " b"] | None
    """None where the loader was given no label column."""
    keys: SampleKeys


class ValidationLoader:
    """The split once, in the order of its shards: every sample on one rank, the last batch smaller where it must be.

    Views as in A.2: shorter side to ceil(size · 256 / 224), centre crop of `size`. Each `iter` is a new pass.
    Raises ShardError as ViewLoader does.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        size: int = 224,
        batch_size: int,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        threads: int = 4,
        prefetch: int = 2,
        label: str | None = None,
        decoder: GpuDecoder = GPU_DECODER,
    ) -> None:
        backend, device_id = _backend(device)
        self._source = open_source(folder, split, label=label, rank=rank, world_size=world_size)
        self._batch_size = batch_size
        self.samples = self._source.samples
        """This rank's share of the split."""
        self._build = lambda: centre_crops(
            self._source,
            size,
            backend=backend,
            read_ahead=prefetch,
            decoder=decoder,
            batch_size=batch_size,
            num_threads=threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch,
        )

    def __len__(self) -> int:
        """Batches of one pass on this rank."""
        return -(-self.samples // self._batch_size)

    def __iter__(self) -> Iterator[ValidationBatch]:
        pipeline = self._build()
        for start in range(0, self.samples, self._batch_size):
            images, origins, *codes = _run(pipeline, self._source.folder)
            whole = min(self._batch_size, self.samples - start)
            labels = parse_labels(codes[0][:whole]).to(images.device, non_blocking=True) if codes else None
            yield ValidationBatch(images[:whole], labels, SampleKeys(origins[:whole]))


def parse_labels(codes: UInt8[Tensor, "b n"]) -> Int64[Tensor, " b"]:
    """Class indices from ASCII digits, padded with zero bytes on the right. ShardError where a byte is no digit."""
    digits = codes.long() - ord("0")
    padding = codes == 0
    if not (((digits >= 0) & (digits <= 9)) | padding).all() or padding[:, 0].any():
        raise ShardError("a label is not an ASCII number; remake the shards with tools/make_shards.py")
    value = torch.zeros(len(codes), dtype=torch.int64)
    for digit, absent in zip(digits.unbind(1), padding.unbind(1), strict=True):
        value = torch.where(absent, value, 10 * value + digit)
    return value


def _run(pipeline: Any, folder: Path) -> list[Tensor]:
    """The next outputs as torch tensors on DALI's own memory, which DALI does not touch again while they live."""
    on_gpu = pipeline.device_id is not None
    try:
        outputs = pipeline.run(torch.cuda.current_stream(pipeline.device_id)) if on_gpu else pipeline.run()
    except RuntimeError as error:
        raise ShardError(
            f"{folder}: DALI could not make a batch: {_reason(error)}. If it is a bad sample, "
            f"'python tools/make_shards.py verify {folder}' names it"
        ) from error
    return [from_dlpack(output.as_tensor()) for output in outputs]


def _reason(error: RuntimeError) -> str:
    """What went wrong and in which operator, out of a page of DALI's traceback."""
    text = str(error)
    operator = re.search(r"operator `(.*?)`", text)
    cause = text.partition("encountered:\n")[2].strip().partition("\n")[0] or text.partition("\n")[0]
    return f"{cause} in {operator[1]}" if operator else cause


def _backend(device: str | torch.device) -> tuple[Backend, int | None]:
    """DALI's name of the device, and the GPU's number."""
    device = torch.device(device)
    if device.type == "cpu":
        return "cpu", None
    return "gpu", torch.cuda.current_device() if device.index is None else device.index


def _seed(*parts: int) -> int:
    """One of DALI's 31-bit seeds from several numbers, so that neighbouring seeds and ranks have nothing in common."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)

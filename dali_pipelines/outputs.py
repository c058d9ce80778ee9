"""From a pipeline's outputs to torch: tensors on DALI's own memory, sample keys, labels, errors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dali_pipelines.photometric import Backend
from dali_pipelines.reader import Source
from shards.manifest import ShardError


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


def parse_labels(codes: UInt8[Tensor, "b n"], keys: Sequence[str], source: Source) -> Int64[Tensor, " b"]:
    """Class indices of these samples from ASCII digits, padded with zero bytes on the right.

    Raises ShardError, which names the sample, for what is no digit and no class of the column.
    """
    assert source.column is not None  # the reader was given a label column
    digits = codes.long() - ord("0")
    padding = codes == 0
    wrong = ((digits < 0) | (digits > 9)) & ~padding
    wrong[:, 0] |= padding[:, 0]
    value = torch.zeros(len(codes), dtype=torch.int64)
    for digit, absent in zip(digits.unbind(1), padding.unbind(1), strict=True):
        value = torch.where(absent, value, 10 * value + digit)
    bad = (wrong.any(1) | (value >= len(source.column.classes))).nonzero()
    if len(bad):
        first = int(bad[0])
        found = codes[first].numpy().tobytes().rstrip(b"\0").decode("ascii", "backslashreplace")
        raise ShardError(
            f"{source.folder}: sample {keys[first]} of split '{source.manifest.split}' has '{found}' where the number "
            f"of a class of '{source.column.name}' should be, 0 to {len(source.column.classes) - 1}; remake the split "
            "with tools/make_shards.py"
        )
    return value


def run(pipeline: Any, folder: Path) -> list[Tensor]:
    """The next outputs as torch tensors on DALI's own memory, which DALI does not touch again while they live."""
    on_gpu = pipeline.device_id is not None
    with _told(folder):
        outputs = pipeline.run(torch.cuda.current_stream(pipeline.device_id)) if on_gpu else pipeline.run()
    return [from_dlpack(output.as_tensor()) for output in outputs]


def build(pipeline: Any, folder: Path) -> None:
    """Make a pipeline ready to run. Raises ShardError where the reader finds samples without a component."""
    with _told(folder):
        pipeline.build()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """DALI's errors, which are a page long, as one line with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if _MEMORY.search(str(error)) or isinstance(error, MemoryError):
            raise ShardError(
                f"{folder}: DALI is out of memory: {_reason(error)}. Lower the batch size that a process has at once "
                "(--data.micro-batch, --micro-batch), --data.prefetch, or --data.decoder-width-hint and -height-hint"
            ) from error
        raise ShardError(
            f"{folder}: DALI could not make a batch: {_reason(error)}. If it is a bad sample, "
            f"'python tools/make_shards.py verify {folder}' names it"
        ) from error


_MEMORY = re.compile(r"out of memory|bad_alloc|cudaErrorMemoryAllocation|OUT_OF_MEMORY|ALLOCATOR_FAILURE")
"""Words of DALI, CUDA and the C++ library where memory could not be had."""


def _reason(error: Exception) -> str:
    """What went wrong and in which operator, out of a page of DALI's traceback."""
    text = str(error)
    operator = re.search(r"operator `(.*?)`", text)
    cause = text.partition("encountered:\n")[2].strip().partition("\n")[0] or text.partition("\n")[0]
    return f"{cause} in {operator[1]}" if operator else cause


def backend_of(device: str | torch.device) -> tuple[Backend, int | None]:
    """DALI's name of the device, and the GPU's number."""
    device = torch.device(device)
    if device.type == "cpu":
        return "cpu", None
    return "gpu", torch.cuda.current_device() if device.index is None else device.index

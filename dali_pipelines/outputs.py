"""Pipeline outputs as torch tensors, sample keys and labels.

The tensors use DALI's memory without a copy. DALI's errors become one line with a remedy.
"""

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

from dali_pipelines.decoder import Decoder
from dali_pipelines.pixels import Backend
from dali_pipelines.reader import DataSource
from shards.cache import location_of
from shards.errors import ShardError


class SampleKeys(Sequence[str]):
    """Keys of a batch's samples, decoded on access from the reader's source info."""

    def __init__(self, source_info: UInt8[Tensor, "b n"]) -> None:
        self._source_info = source_info

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> SampleKeys: ...
    def __getitem__(self, index: int | slice) -> str | SampleKeys:
        if isinstance(index, slice):
            return SampleKeys(self._source_info[index])
        source_info = self._source_info[index].numpy().tobytes().rstrip(b"\0").decode()
        # "tar:offset:KEY.jpg": a key has no dot; key and offset have no colon.
        return source_info.rpartition(":")[2].partition(".")[0]

    def __len__(self) -> int:
        return len(self._source_info)

    def tars(self) -> set[str]:
        """Return the file names of the tars that the samples are from."""
        infos = (bytes(info).rstrip(b"\0").decode() for info in self._source_info.numpy())
        return {info.rsplit(":", 2)[0].rpartition("/")[2] for info in infos}

    def __repr__(self) -> str:
        return f"SampleKeys({list(self)})"


def parse_labels(codes: UInt8[Tensor, "b n"], keys: Sequence[str], source: DataSource) -> Int64[Tensor, " b"]:
    """Convert ASCII digits, padded with zero bytes on the right, to the class indices of these samples.

    Raise ShardError, which names the sample, for a label that is not a number or not a class of the column.
    """
    assert source.column is not None  # the reader has a label column
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
            f"{source.folder}: sample {keys[first]} of split '{source.manifest.split}' has label '{found}', but the "
            f"class indices of '{source.column.name}' are 0 to {len(source.column.classes) - 1}; remake the split "
            "with iwm shards"
        )
    return value


def run_pipeline(pipeline: Any, folder: Path) -> list[Tensor]:
    """Return the next outputs as torch tensors in DALI's memory, which DALI does not reuse while they exist.

    On a GPU they are bound to the current stream: DALI reuses their memory after the work that is queued there.
    """
    on_gpu = pipeline.device_id is not None
    with _translate_errors(folder):
        outputs = pipeline.run(torch.cuda.current_stream(pipeline.device_id)) if on_gpu else pipeline.run()
    return [from_dlpack(output.as_tensor()) for output in outputs]


def build_pipeline(pipeline: Any, folder: Path) -> None:
    """Build a pipeline. Raise ShardError where the reader finds samples without a component."""
    with _translate_errors(folder):
        pipeline.build()


@contextmanager
def _translate_errors(folder: Path) -> Iterator[None]:
    """Convert DALI's errors, which are a page long, to a ShardError of one line with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if _MEMORY.search(str(error)) or isinstance(error, MemoryError):
            raise ShardError(
                f"{folder}: DALI is out of memory: {_reason(error)}. Lower the batch size of a process "
                "(--data.micro-batch-size, --micro-batch-size), --data.prefetch-queue-depth, or "
                "--data.decoder-width-hint and --data.decoder-height-hint"
            ) from error
        raise ShardError(
            f"{folder}: DALI could not make a batch: {_reason(error)}. If a sample is damaged, "
            f"'iwm verify {location_of(folder)}' names it"
        ) from error


_MEMORY = re.compile(r"out of memory|bad_alloc|cudaErrorMemoryAllocation|OUT_OF_MEMORY|ALLOCATOR_FAILURE")
"""Parts of the messages of DALI, CUDA and the C++ library for a failed memory allocation."""


def _reason(error: Exception) -> str:
    """Extract the cause and the operator from DALI's error message."""
    text = str(error)
    operator = re.search(r"operator `(.*?)`", text)
    cause = text.partition("encountered:\n")[2].strip().partition("\n")[0] or text.partition("\n")[0]
    return f"{cause} in {operator[1]}" if operator else cause


def backend_of(device: str | torch.device) -> tuple[Backend, int | None]:
    """Return DALI's name of the device type, and the GPU's index (None for a CPU)."""
    device = torch.device(device)
    if device.type == "cpu":
        return "cpu", None
    return "gpu", torch.cuda.current_device() if device.index is None else device.index


def pipeline_options(
    device: str | torch.device, *, batch_size: int, num_threads: int, prefetch_queue_depth: int, decoder: Decoder
) -> dict[str, Any]:
    """Return the keywords that every pipeline has: where and how it runs, and how far its reader runs ahead."""
    backend, device_id = backend_of(device)
    return {
        "backend": backend,
        "reader_prefetch": prefetch_queue_depth,
        "decoder": decoder,
        "batch_size": batch_size,
        "num_threads": num_threads,
        "device_id": device_id,
        "prefetch_queue_depth": prefetch_queue_depth,
    }

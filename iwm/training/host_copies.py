"""Copies of a training state in host memory, made without making the host wait for the device.

The buffers are allocated once and used again by every copy: pinned where the state is on a GPU, so that the device
fills them while the host goes on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_iter, tree_map_only

BLOCK = 256 * 2**20
"""Size of an allocation that buffers share (bytes). torch rounds pinned allocations up to a power of two: up to twice
the bytes if each tensor had its own."""
ALIGNMENT = 64
"""Alignment of a buffer (bytes)."""


@dataclass(frozen=True)
class HostShard:
    """Copy of this process's shard of a tensor that is sharded by rows (FSDP)."""

    rows: Tensor
    """Rows of this process; none where there are fewer rows than processes."""
    shape: torch.Size
    """Shape of the whole tensor."""


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor: its shard where it is sharded, else all of it. Nothing is communicated.

    Raises ValueError for shards other than those of parallel.py: rows, over a mesh of one dimension.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if not (is_sharded(tensor) or all(placement.is_replicate() for placement in tensor.placements)):
        raise ValueError(f"a tensor with placements {tensor.placements}: shards must be rows over one dimension")
    return tensor.to_local()


def is_sharded(tensor: Tensor) -> bool:
    """Return True where each process has rows of the tensor (FSDP)."""
    return isinstance(tensor, DTensor) and tensor.placements == (Shard(0),)


class HostCopies:
    """Buffers in host memory, and copies of nested containers of tensors in them."""

    def __init__(self, device: torch.device, *, sharded_only: bool) -> None:
        """Store the arguments. device: place of the state.

        sharded_only: copy sharded tensors alone, where another process copies the others.
        """
        self._pinned, self._sharded_only = device.type == "cuda", sharded_only
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._used: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        free = sum(size * len(buffers) for size, buffers in self._free.items())
        return free + sum(buffer.nbytes for buffer in self._used)

    def reserve(self, tensors: Iterable[Tensor]) -> None:
        """Allocate the buffers of a state with these tensors, so that its first copy does not have to."""
        sizes = [local_part(tensor).nbytes for tensor in tensors if self._is_copied(tensor)]
        self._allocate([size for size in sizes if size])

    @torch.no_grad()
    def copy(self, content: Any) -> Any:
        """Start to copy a nested container; the copy before is overwritten.

        The copies are complete once an event recorded afterwards on the current stream has completed, and work queued
        on that stream afterwards does not affect them. Sharded tensors become HostShards; tensors that are not copied
        become None.
        """
        while self._used:
            buffer = self._used.pop()
            self._free[buffer.nbytes].append(buffer)
        missing: defaultdict[int, int] = defaultdict(int)
        for tensor in tensors_of(content):
            if self._is_copied(tensor) and (size := local_part(tensor).nbytes):
                missing[size] += 1
        self._allocate([size for size, count in missing.items() for _ in range(count - len(self._free[size]))])
        return tree_map_only(Tensor, self._copy_leaf, content)

    def _is_copied(self, tensor: Tensor) -> bool:
        return not self._sharded_only or is_sharded(tensor)

    def _copy_leaf(self, tensor: Tensor) -> Tensor | HostShard | None:
        if not self._is_copied(tensor):
            return None
        copied = self._copy_tensor(local_part(tensor))
        return HostShard(copied, tensor.shape) if is_sharded(tensor) else copied

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        if not tensor.nbytes:
            return torch.empty_like(tensor, device="cpu")
        buffer = self._free[tensor.nbytes].pop()
        self._used.append(buffer)
        # The strides of a dense tensor are kept: channels-last weights are copied as they lie in memory.
        strides = torch.empty_like(tensor, device="meta").stride()
        return buffer.view(tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor, non_blocking=True)

    def _allocate(self, sizes: list[int]) -> None:
        """Allocate a buffer of each size. Each has a storage of its own, so that torch.save writes its bytes alone."""
        for group in _blocks(sizes):
            ends = [math.ceil(size / ALIGNMENT) * ALIGNMENT for size in group]
            # Zeroed: the memory of a CPU is in place only once it is written.
            block = torch.zeros(sum(ends), dtype=torch.uint8, pin_memory=self._pinned).numpy()
            offset = 0
            for size, taken in zip(group, ends, strict=True):
                self._free[size].append(torch.from_numpy(block[offset : offset + size]))
                offset += taken


def _blocks(sizes: list[int]) -> Iterator[list[int]]:
    """Divide sizes into groups of at most BLOCK bytes, or of one larger size."""
    group: list[int] = []
    for size in sizes:
        if group and sum(group) + size + ALIGNMENT * len(group) > BLOCK:
            yield group
            group = []
        group.append(size)
    if group:
        yield group


def tensors_of(content: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested container, in order."""
    return (leaf for leaf in tree_iter(content) if isinstance(leaf, Tensor))

"""Gathering of sharded copies on rank 0, in host memory, for a checkpoint file of the whole state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_iter, tree_map_only

from iwm.training.host_copies import HostShard


def gather(content: Any, local: Any, group: ProcessGroup | None) -> tuple[Any, list[Any]] | None:
    """Return the content with its HostShards joined, and the `local` values by rank, on rank 0; None on other ranks.

    The shards travel tensor by tensor: no process but rank 0 gets rows of another one. Every process of the group must
    call this, with the same sharded tensors in the same order. group: a gloo group of all processes; None for a single
    process. Raises RuntimeError where a process is gone, or the shards do not make up the tensors.
    """
    if group is None:
        return content, [local]
    shards = [leaf for leaf in tree_iter(content) if isinstance(leaf, HostShard)]
    rows = [len(shard.rows) for shard in shards]
    if group.rank() > 0:
        torch.distributed.gather_object((local, rows), None, dst=0, group=group)
        for shard in shards:
            if len(shard.rows):
                torch.distributed.send(shard.rows.contiguous(), 0, group)
        # Rank 0 has received everything before another process may end.
        torch.distributed.barrier(group)
        return None
    parts: list[Any] = [None] * group.size()
    torch.distributed.gather_object((local, rows), parts, dst=0, group=group)
    counts = zip(*(rows for _, rows in parts), strict=True)
    joined = tree_map_only(HostShard, lambda shard: _join(shard, next(counts), group), content)
    torch.distributed.barrier(group)
    return joined, [local for local, _ in parts]


def _join(shard: HostShard, counts: tuple[int, ...], group: ProcessGroup) -> Tensor:
    """Receive the rows of the other ranks and return the whole tensor. counts: number of rows by rank."""
    if sum(counts) != shard.shape[0]:
        raise RuntimeError(f"shards of {counts} rows do not make up a tensor of {shard.shape[0]}")
    whole = torch.empty(shard.shape, dtype=shard.rows.dtype)
    for rank, rows in enumerate(whole.split(list(counts))):
        if rank == 0:
            rows.copy_(shard.rows)
        elif len(rows):
            torch.distributed.recv(rows, rank, group)
    return whole

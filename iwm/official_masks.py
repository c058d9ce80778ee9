"""Masks as I-JEPA's code draws them (masking.sampler `official`), and its cut to the least of a batch (masking.cut).

All blocks of a step have one size, no block reaches the last row and column, and the context block is drawn again until
enough of it is left. The cut keeps each image's first patches, in row-major order, as many as every image of the batch
has. Both are functions of (seed, step, index) like all masks: the batch is a group of consecutive indices, which is
drawn whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from iwm.block_sizes import Sides, context_sides, target_sides
from iwm.hashing import hashed_uniform
from iwm.model_config import MaskingConfig

TRIES = 20
"""Number of places of the context block after which it may overlap one target block more."""

Drawn = tuple[Bool[Tensor, "b k n"], Bool[Tensor, "b n"]]
"""Target blocks, and what is visible."""


def sizes_of_step(masking: MaskingConfig, grid: int, seed: int, step: int) -> tuple[Sides, Sides]:
    """Return the sides of all target blocks and of all context blocks of a step.

    They are the same for every process, as in I-JEPA's code, where the number of the iteration seeds them.
    """
    target, context = hashed_uniform(seed, step, torch.tensor([-1]), 2)[0].tolist()  # no image has the index −1
    return target_sides(masking, grid, target), context_sides(masking, grid, context)


def official_blocks(
    masking: MaskingConfig, grid: int, target: Sides, seed: int, step: int, index: Int64[Tensor, "b"]
) -> Bool[Tensor, "b k n"]:
    """Draw the places of the target blocks, which all have the sides `target`."""
    k = masking.num_blocks
    return _placed(hashed_uniform(seed, step, index, 2 * k).unflatten(1, (k, 2)), grid, target)


def official_context(
    masking: MaskingConfig,
    grid: int,
    context: Sides,
    seed: int,
    step: int,
    index: Int64[Tensor, "b"],
    blocks: Bool[Tensor, "b k n"],
) -> Bool[Tensor, "b n"]:
    """Draw the place of the context block, and return what is visible: its patches outside the target blocks."""
    k = masking.num_blocks
    visible = torch.zeros_like(blocks[:, 0])
    missing = torch.arange(len(index), device=index.device)
    for attempt in range(TRIES * k + 1):
        # The last attempts leave out target blocks from the last on, and the very last one all of them.
        excluded = blocks[missing, : k - attempt // TRIES].any(dim=1)
        places = hashed_uniform(seed, step, index[missing], 2 * (k + attempt) + 2)[:, -2:]
        found = _placed(places[:, None], grid, context)[:, 0] & ~excluded
        visible[missing] = found
        missing = missing[found.sum(1) <= masking.min_keep]
        if not len(missing):
            break
    return visible


def _placed(draws: Float64[Tensor, "b k 2"], grid: int, sides: Sides) -> Bool[Tensor, "b k n"]:
    """Return the masks of rectangles, each from two uniform numbers: top, left."""
    place = torch.arange(grid, device=draws.device)
    inside = []
    for axis, side in enumerate(sides):
        first = (draws[..., axis] * (grid - side)).floor()[..., None]
        inside.append((place >= first) & (place < first + side))
    return (inside[0][..., :, None] & inside[1][..., None, :]).flatten(-2)


def draw_and_cut(index: Int64[Tensor, "b"], group: int, draw: Callable[[Int64[Tensor, "g"]], Drawn]) -> Drawn:
    """Draw the groups that the images belong to, and cut the images' masks to the least of their group.

    group: number of consecutive images. draw: draws any images. All blocks of a group are cut to the smallest of them.
    """
    groups, which = (index // group).unique(return_inverse=True)
    members = groups[:, None] * group + torch.arange(group, device=index.device)
    blocks, visible = draw(members.flatten())
    fewest = visible.sum(-1).unflatten(0, (-1, group)).amin(1)[which]
    smallest = blocks.sum(-1).unflatten(0, (-1, group)).amin((1, 2))[which]
    own = which * group + index % group
    return _first(blocks[own], smallest[:, None, None]), _first(visible[own], fewest[:, None])


def _first(mask: Bool[Tensor, "*b n"], count: Int64[Tensor, "..."]) -> Bool[Tensor, "*b n"]:
    """Return the first `count` True entries of each row."""
    return mask & (mask.cumsum(-1) <= count)

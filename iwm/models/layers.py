"""Position embeddings, initialisation, forward pass and compilation of timm's blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from jaxtyping import Float, Int64
from timm.layers import DropPath, calculate_drop_path_rates, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iwm.compat import set_recompile_limit
from iwm.model_config import Initialisation
from iwm.packing import Packing
from iwm.train_config import CompileMode, ResidualDtype


def sincos_positions(width: int, grid: int) -> Float[Tensor, "n {width}"]:
    """Return the fixed 2-D sine-cosine positions of MAE and I-JEPA for a grid×grid image, row-major.

    The first half of the features encodes the column, the second the row; each half is sines, then cosines.
    """
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    one_side = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns = one_side[None, :, :].expand(grid, grid, -1)
    rows = one_side[:, None, :].expand(grid, grid, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1).float()


def resample_positions(
    positions: Float[Tensor, "1 s d"], grid: tuple[int, int], new_grid: tuple[int, int], prefix: int = 0
) -> Float[Tensor, "1 s2 d"]:
    """Interpolate positions from one grid (rows, columns) to another, bicubic, as in MAE's finetuning.

    The first `prefix` positions belong to tokens that are not patches (class token, registers) and stay unchanged.
    """
    resampled: Tensor = resample_abs_pos_embed(
        positions, list(new_grid), list(grid), num_prefix_tokens=prefix, antialias=False
    )
    return resampled


def add_positions(
    tokens: Float[Tensor, "*b n d"], positions: Float[Tensor, "... n d"], residual: ResidualDtype
) -> Float[Tensor, "*b n d"]:
    """Add positions to tokens; the sum sets the precision of the whole residual stream.

    residual (train.residual_dtype): `fp32`: float32. `bf16`: the tokens' dtype, bf16 under autocast. `auto`: `bf16` on
    a GPU, `fp32` on a CPU.
    """
    wide = residual == "fp32" or (residual == "auto" and not tokens.is_cuda)
    return tokens + (positions if wide else positions.to(tokens.dtype))


def init_weights(module: nn.Module, kind: Initialisation, blocks: Iterable[Block] = ()) -> None:
    """Initialise every linear and convolutional layer in `module`, with biases at zero; norms stay at timm's defaults.

    kind: as in encoder.init. blocks: transformer blocks of the module, whose output projections `beit` divides by
    sqrt(2·i) in block i, counted from 1.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            if kind == "xavier":
                nn.init.xavier_uniform_(part.weight.flatten(1))
            else:
                nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    if kind != "beit":
        return
    with torch.no_grad():
        for number, block in enumerate(blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2.0 * number))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * number))


class TensorDropPath(DropPath):
    """timm's DropPath with its rate in a tensor.

    Blocks of different rates thus share one graph of torch.compile; rates as Python numbers would need a graph each.
    """

    keep_prob: Tensor

    def __init__(self, rate: float) -> None:
        """Initialise. rate: probability in [0, 1) that an image's path is dropped."""
        super().__init__(rate)
        self.register_buffer("keep_prob", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if not self.training:
            return x
        drawn = torch.bernoulli(self.keep_prob.expand(len(x), 1, 1)) / self.keep_prob
        return x * drawn.to(x.dtype)


def set_drop_path(blocks: nn.ModuleList | nn.Sequential, rate: float) -> None:
    """Set the blocks' drop path rates: linear over depth from 0 in the first to `rate` in the last, as in timm.

    Samples come from torch's default generator of the device.
    """
    for block, drop in zip(blocks, calculate_drop_path_rates(rate, len(blocks)), strict=True):
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, TensorDropPath(drop) if drop > 0 else nn.Identity())


def _draws(block: nn.Module) -> bool:
    """Return True where a block is random, so that its recomputation must draw the same numbers."""
    return block.training and any(isinstance(part, DropPath) for part in block.children())


def forward_blocks(
    blocks: Iterable[nn.Module],
    tokens: Float[Tensor, "b t d"],
    packing: Packing | None = None,
    *,
    selected: Int64[Tensor, " s"] | None = None,
    grad_checkpointing: bool = False,
) -> Float[Tensor, "b2 t2 d"]:
    """Run tokens through blocks: rows of equal length, or one row of packed tokens.

    selected: tokens that the last block (a Block of this project) returns, as one row; None: all.
    grad_checkpointing: store only the input of each block, and recompute the block in the backward pass.
    """
    blocks = list(blocks)
    for block in blocks:
        run = partial(block, attn_mask=packing)
        if selected is not None and block is blocks[-1]:
            run = partial(run, selected=selected)
        if grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(run, tokens, use_reentrant=False, preserve_rng_state=_draws(block))
        else:
            tokens = run(tokens)
    return tokens


RECOMPILE_LIMIT = 64
"""Maximum number of compiled graphs of one function, beyond which torch runs without compiling (torch's default: 8).
torch counts all blocks of a process as one function, and the downstream protocols use many kinds of blocks and shapes.
"""


def compile_blocks(
    module: nn.Module, blocks: Iterable[nn.Module], *methods: str, mode: CompileMode = "default"
) -> None:
    """Compile each block separately, and the named methods of the module, for static shapes.

    mode: train.compile_mode.
    """
    set_recompile_limit(RECOMPILE_LIMIT)
    for block in blocks:
        block.compile(dynamic=False, mode=mode)
    for method in methods:
        setattr(module, method, torch.compile(getattr(module, method), dynamic=False, mode=mode))

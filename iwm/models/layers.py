"""What encoder and predictor share: positions, initialisation, running and compiling timm's blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from timm.layers import DropPath, calculate_drop_path_rates, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iwm.compat import allow_graphs
from iwm.config import ResidualKind
from iwm.kernels.gelu import Gelu
from iwm.kernels.mlp import Mlp
from iwm.models.attention import Attention
from iwm.packing import Packing

OWN_LAYERS: dict[str, type[nn.Module]] = {"attn_layer": Attention, "mlp_layer": Mlp, "act_layer": Gelu}
"""Parts of timm's blocks that are ours, by the arguments of timm that take them."""


def sincos_positions(width: int, grid: int) -> Float[Tensor, "n {width}"]:
    """Fixed 2-D sine-cosine positions of a grid×grid image, row-major, as MAE and I-JEPA use them.

    The first half of the features encodes the column, the second the row; each half is sines then cosines.
    """
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    one_side = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns = one_side[None, :, :].expand(grid, grid, -1)
    rows = one_side[:, None, :].expand(grid, grid, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1).float()


def resample_positions(
    positions: Float[Tensor, "1 s d"], grid: tuple[int, int], wanted: tuple[int, int], prefix: int = 0
) -> Float[Tensor, "1 s2 d"]:
    """Positions of a grid (rows, columns) for another one, bicubic, as MAE's finetuning resizes them.

    The first `prefix` positions are of tokens that stand for no patch: they stay.
    """
    resampled: Tensor = resample_abs_pos_embed(
        positions, list(wanted), list(grid), num_prefix_tokens=prefix, antialias=False
    )
    return resampled


def add_positions(
    tokens: Float[Tensor, "*b n d"], positions: Float[Tensor, "... n d"], residual: ResidualKind
) -> Float[Tensor, "*b n d"]:
    """Tokens with positions, which begin the residual stream in the precision that all its sums then have.

    residual (train.residual): `fp32`: float32. `bf16`: that of the tokens, bf16 under autocast.
    """
    wide = residual == "fp32" or (residual == "auto" and not tokens.is_cuda)
    return tokens + (positions if wide else positions.to(tokens.dtype))


def initialise(module: nn.Module, kind: Literal["ijepa", "xavier"]) -> None:
    """Initialise every linear and convolution below `module`; norms are ones and zeros, biases zeros."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            if kind == "xavier":
                nn.init.xavier_uniform_(part.weight.flatten(1))
            else:
                nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def rescale_by_depth(blocks: Iterable[Block]) -> None:
    """Divide each block's two output projections by sqrt(2·depth), as I-JEPA's and BEiT's initialisation does."""
    with torch.no_grad():
        for number, block in enumerate(blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2.0 * number))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * number))


class TensorDropPath(DropPath):
    """timm's DropPath, of a rate in a tensor: to torch.compile, blocks of different rates are the same graph, where
    different numbers would be one each."""

    kept: Tensor

    def __init__(self, rate: float) -> None:
        """rate: chance that an image's path is dropped, from 0 to below 1."""
        super().__init__(rate)
        self.register_buffer("kept", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if not self.training:
            return x
        drawn = torch.bernoulli(self.kept.expand(len(x), 1, 1)) / self.kept
        return x * drawn.to(x.dtype)


def set_drop_path(blocks: nn.ModuleList | nn.Sequential, rate: float) -> None:
    """Let blocks drop their paths in training: by chance 0 the first, by `rate` the last, linear between (timm's).

    Draws come from torch's own generator of the device.
    """
    for block, drop in zip(blocks, calculate_drop_path_rates(rate, len(blocks)), strict=True):
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, TensorDropPath(drop) if drop > 0 else nn.Identity())


def _draws(block: nn.Module) -> bool:
    """Whether something in a block is random: then what is run again must draw the same."""
    return block.training and any(isinstance(part, DropPath) for part in block.children())


def run_blocks(
    blocks: Iterable[nn.Module],
    tokens: Float[Tensor, "b t d"],
    packing: Packing | None = None,
    *,
    checkpointing: bool = False,
) -> Float[Tensor, "b t d"]:
    """Send tokens through blocks: rows of equal length, or one row of packed ones.

    checkpointing: keep only what enters each block, and run it again in the backward pass.
    """
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, attn_mask=packing, use_reentrant=False, preserve_rng_state=_draws(block))
        else:
            tokens = block(tokens, attn_mask=packing)
    return tokens


GRAPHS = 64
"""Most graphs of one function, beyond which torch goes on without compiling. All blocks of a process are one function
to it, and the downstream protocols have blocks of many kinds and shapes; torch's own limit is 8."""


def compile_parts(module: nn.Module, blocks: Iterable[nn.Module], *methods: str) -> None:
    """Compile each block by itself, and these methods of the module, for static shapes."""
    allow_graphs(GRAPHS)
    for block in blocks:
        block.compile(dynamic=False)
    for method in methods:
        setattr(module, method, torch.compile(getattr(module, method), dynamic=False))

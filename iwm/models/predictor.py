"""The predictor: the world model itself (paper, sections 3, 4.1 and A.1)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from iwm.config import Config
from iwm.masking import PackedMasks
from iwm.models.layers import (
    OWN_LAYERS,
    add_positions,
    initialise,
    resample_positions,
    rescale_by_depth,
    run_blocks,
    sincos_positions,
)
from iwm.packing import lay, pick


class FeatureConditioning(nn.Module):
    """Mixes the action into mask tokens: [token, action] through three layers of one width, ReLU between (A.1)."""

    def __init__(self, width: int, action_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width + action_size, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "n d"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b n d"]:
        # The first layer of a concatenation is a sum of two products, of which neither needs all b·n rows.
        by_token, by_action = self.fc1.weight.split((tokens.shape[-1], action.shape[-1]), dim=1)
        mixed = F.linear(tokens, by_token, self.fc1.bias)[None] + F.linear(action, by_action)[:, None]
        return self.fc3(F.relu(self.fc2(F.relu(mixed))))


class SequenceConditioning(nn.Module):
    """One token per action component, each through a linear layer of its own (section 4.2).

    Tokens begin about as large as the patches' positions: much smaller ones are drowned by what the first block adds.
    """

    def __init__(self, width: int, action_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(action_size, width))
        self.bias = nn.Parameter(torch.empty(action_size, width))
        nn.init.trunc_normal_(self.weight)
        nn.init.trunc_normal_(self.bias)

    def forward(self, action: Float[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        return action[:, :, None] * self.weight + self.bias


class Predictor(nn.Module):
    """A ViT of its own width that maps context features to target features, told by the action what changed.

    `inpaint` is the training task: visible and queried positions in one grid. `transform` is the whole-image task of
    evaluation: every position is both context and query (2n tokens, paper section 5.1).
    """

    positions: Tensor
    prefix = 0
    """Tokens of the context of `ask` that stand for no patch."""

    def __init__(self, config: Config, action_size: int) -> None:
        super().__init__()
        width, encoder_width = config.predictor.width, config.encoder.width
        self.grid, self.action_size = config.grid, action_size
        self.checkpointing = config.train.activation_checkpointing
        self.residual = config.train.residual
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_positions(width, config.grid), persistent=False)
        self.mix = FeatureConditioning(width, action_size) if config.action.conditioning == "feature" else None
        self.action_tokens = (
            SequenceConditioning(width, action_size) if config.action.conditioning == "sequence" else None
        )
        self.extra = action_size if config.action.conditioning == "sequence" else 0
        """Tokens that stand for no patch."""
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.predictor.heads,
                config.predictor.mlp_ratio,
                qkv_bias=True,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                **OWN_LAYERS,
            )
            for _ in range(config.predictor.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.project = nn.Linear(width, encoder_width)
        initialise(self, config.encoder.init)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if config.encoder.init == "ijepa":
            rescale_by_depth(self.blocks)

    @property
    def conditioned(self) -> bool:
        """Whether an action changes anything."""
        return self.mix is not None or self.action_tokens is not None

    def inpaint(
        self, context: Float[Tensor, "1 t e"], masks: PackedMasks, action: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b m n e"]:
        """Predict target features at every position of the grid, of which those `queried` (and visible) mean something.

        context: features of the visible patches, packed. Visible positions hold them, queried ones a mask token;
        positions that are neither are attended by none. One pass for all m predictions of each image.
        """
        tokens = self.place(context, masks, action)
        tokens = run_blocks(self.blocks, tokens, masks.rows, checkpointing=self.checkpointing)
        return self.finish(tokens, masks)

    def place(
        self, context: Float[Tensor, "1 t e"], masks: PackedMasks, action: Float[Tensor, "b k"]
    ) -> Float[Tensor, "r s d"]:
        """Context features and mask tokens in their places of the grid: [b, n, d], or packed [1, t, d]."""
        b, m, n = masks.queried.shape
        at = masks.context.place
        seen = add_positions(self.embed(context[0]), self.positions[at % n], self.residual)
        tokens = lay(seen, at, self.queries(action).to(seen.dtype).flatten(0, 1)).unflatten(0, (b, n))
        tokens = self.with_action(tokens, action)
        if masks.rows is None:
            return tokens
        return pick(tokens[:, None].expand(-1, m, -1, -1).flatten(0, 2), masks.rows.place)[None]

    def finish(self, tokens: Float[Tensor, "r s d"], masks: PackedMasks) -> Float[Tensor, "b m n e"]:
        """Predictions from what left the last block, back in the grid; nothing (zero) where nothing was packed."""
        b, m, n = masks.queried.shape
        if masks.rows is not None:
            predictions = self.project(self.norm(tokens[0]))
            places = b * m * (n + self.extra)
            predictions = lay(predictions, masks.rows.place, predictions.new_zeros(places, predictions.shape[1]))
            return predictions.view(b, m, n + self.extra, -1)[:, :, :n]
        return self.project(self.norm(tokens[:, None, :n]))

    def transform(self, context: Float[Tensor, "b n e"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b n e"]:
        """Predict the features of the whole transformed image from those of the whole source image."""
        n = context.shape[1]
        tokens = run_blocks(self.blocks, self.ask(context, action))
        return self.project(self.norm(tokens[:, n : 2 * n]))

    def ask(
        self,
        context: Float[Tensor, "b n e"],
        action: Float[Tensor, "b k"],
        grid: tuple[int, int] | None = None,
        *,
        whole: bool = True,
    ) -> Float[Tensor, "b s d"]:
        """What enters the blocks where every position is seen: context, queries, the action's tokens if there are any.

        grid: rows and columns of the context (None: training's); for another, positions are interpolated. whole: a
        query of every position; else one alone, which has none (section 5.1).
        """
        positions = self.positions if grid is None else self.positions_of(grid)
        seen = add_positions(self.embed(context), positions, self.residual)
        asked = self.queries(action, positions if whole else positions.new_zeros(1, positions.shape[1]))
        tokens = self.with_action(torch.cat((seen, asked.to(seen.dtype)), dim=1), action)
        # Training has every position once, the whole image two of each: so twice the action's tokens, or their share of
        # the attention would be halved and the action applied too weakly.
        return self.with_action(tokens, action) if whole else tokens

    def positions_of(self, grid: tuple[int, int]) -> Float[Tensor, "n d"]:
        """Positions of a grid of so many rows and columns, interpolated where it is not training's."""
        return resample_positions(self.positions[None], (self.grid, self.grid), grid)[0]

    def queries(
        self, action: Float[Tensor, "b k"], positions: Float[Tensor, "n d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Mask tokens of every position (or of these), with the action mixed in where conditioning is `feature`."""
        tokens = self.mask_token + (self.positions if positions is None else positions)
        return tokens.expand(action.shape[0], -1, -1) if self.mix is None else self.mix(tokens, action)

    def with_action(self, tokens: Float[Tensor, "b s d"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b s2 d"]:
        """With the action's own tokens behind where conditioning is `sequence`."""
        if self.action_tokens is None:
            return tokens
        return torch.cat((tokens, self.action_tokens(action).to(tokens.dtype)), dim=1)

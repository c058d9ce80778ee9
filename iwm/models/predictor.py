"""The predictor: the world model itself (paper, sections 3, 4.1 and A.1)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from iwm.config import Config
from iwm.models.layers import initialise, rescale_by_depth, run_blocks, sincos_positions


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
    """One token per action component, each through a linear layer of its own (section 4.2)."""

    def __init__(self, width: int, action_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(action_size, width))
        self.bias = nn.Parameter(torch.empty(action_size, width))
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, action: Float[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        return action[:, :, None] * self.weight + self.bias


class Predictor(nn.Module):
    """A ViT of its own width that maps context features to target features, told by the action what changed.

    `inpaint` is the training task: visible and queried positions in one grid. `transform` is the whole-image task of
    evaluation: every position is both context and query (2n tokens, paper section 5.1).
    """

    positions: Tensor

    def __init__(self, config: Config, action_size: int) -> None:
        super().__init__()
        width, encoder_width = config.predictor.width, config.encoder.width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_positions(width, config.grid), persistent=False)
        self.mix = FeatureConditioning(width, action_size) if config.action.conditioning == "feature" else None
        self.action_tokens = (
            SequenceConditioning(width, action_size) if config.action.conditioning == "sequence" else None
        )
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.predictor.heads,
                config.predictor.mlp_ratio,
                qkv_bias=True,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )
            for _ in range(config.predictor.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.project = nn.Linear(width, encoder_width)
        initialise(self, config.encoder.init)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if config.encoder.init == "ijepa":
            rescale_by_depth(self.blocks)

    def inpaint(
        self,
        context: Float[Tensor, "b w e"],
        visible: Bool[Tensor, "b n"],
        queried: Bool[Tensor, "b n"],
        action: Float[Tensor, "b k"],
    ) -> Float[Tensor, "b n e"]:
        """Predict target features at every position of the grid, of which those `queried` (and visible) mean something.

        context: features of the visible patches in position order, first in each row (encoder.select_visible). Visible
        positions hold them, queried positions a mask token; positions that are neither are attended by none.
        """
        place = (visible.cumsum(dim=1) - 1).clamp(0, context.shape[1] - 1)
        seen = self.embed(context)
        seen = seen.gather(1, place[:, :, None].expand(-1, -1, seen.shape[-1])) + self.positions
        tokens = torch.where(visible[:, :, None], seen, self.queries(action).to(seen.dtype))
        return self._run(tokens, action, visible | queried, slice(0, tokens.shape[1]))

    def transform(self, context: Float[Tensor, "b n e"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b n e"]:
        """Predict the features of the whole transformed image from those of the whole source image."""
        n = context.shape[1]
        seen = self.embed(context) + self.positions
        tokens = torch.cat((seen, self.queries(action).to(seen.dtype)), dim=1)
        return self._run(tokens, action, None, slice(n, 2 * n))

    def queries(self, action: Float[Tensor, "b k"]) -> Float[Tensor, "b n d"]:
        """Mask tokens of every position, with the action mixed in where conditioning is `feature`."""
        tokens = self.mask_token + self.positions
        return tokens.expand(action.shape[0], -1, -1) if self.mix is None else self.mix(tokens, action)

    def _run(
        self,
        tokens: Float[Tensor, "b t d"],
        action: Float[Tensor, "b k"],
        present: Bool[Tensor, "b t"] | None,
        wanted: slice,
    ) -> Float[Tensor, "b s e"]:
        if self.action_tokens is not None:
            extra = self.action_tokens(action).to(tokens.dtype)
            tokens = torch.cat((tokens, extra), dim=1)
            if present is not None:
                present = torch.cat((present, present.new_ones(extra.shape[:2])), dim=1)
        return self.project(self.norm(run_blocks(self.blocks, tokens, present)[:, wanted]))

"""Predictor, the world model (paper, sections 3, 4.1 and A.1)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from iwm.actions import action_spec
from iwm.config import Config
from iwm.masking import PackedMasks
from iwm.models.block import OWN_LAYERS, Block
from iwm.models.layers import (
    add_positions,
    forward_blocks,
    init_weights,
    resample_positions,
    sincos_positions,
)
from iwm.packing import gather_tokens, scatter_tokens


class Conditioning(nn.Module):
    """Conditioning `none`, and base class of the others: the predictor does not receive the action.

    To add a kind, derive a class and add it to CONDITIONING and its name to ActionConfig (docs/extending.md).
    """

    module_name: ClassVar[str] = "no_conditioning"
    """Name of the module in the predictor, the prefix of its parameters in the state dict."""
    conditioned: ClassVar[bool] = False
    """True where the output depends on the action."""

    def __init__(self, width: int, action_size: int) -> None:
        super().__init__()

    @staticmethod
    def num_tokens(action_size: int) -> int:
        """Return the number of tokens that `append` adds."""
        return 0

    @staticmethod
    def flops(width: int, action_size: int, positions: int) -> int:
        """Return the FLOPs per image of this module's matrix products, without those of the blocks on its tokens."""
        return 0

    def mix(self, tokens: Float[Tensor, "n d"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b n d"]:
        """Return the mask tokens of each image from the shared ones."""
        return tokens.expand(action.shape[0], -1, -1)

    def append(self, tokens: Float[Tensor, "b s d"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b s2 d"]:
        """Append the action tokens to the sequence."""
        return tokens

    def action_weights(self) -> Float[Tensor, "d k"] | None:
        """Return a view of the weights that multiply the action, one column per entry; None where there are none.

        Weights from a run with other strengths of the jitter are rescaled by it (iwm/training/initial_weights.py).
        """
        return None


class FeatureConditioning(Conditioning):
    """Conditioning `feature`: three linear layers with ReLU between mix the action into each mask token (A.1)."""

    module_name = "action_mixer"
    conditioned = True

    def __init__(self, width: int, action_size: int) -> None:
        super().__init__(width, action_size)
        self.fc1 = nn.Linear(width + action_size, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)

    @staticmethod
    def flops(width: int, action_size: int, positions: int) -> int:
        # The first layer computes the action's product once per image, the tokens' product once per batch.
        return 2 * width * (action_size + 2 * positions * width)

    def forward(self, tokens: Float[Tensor, "n d"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b n d"]:
        # A linear layer of a concatenation is a sum of two products, neither of which needs all b·n rows.
        by_token, by_action = self.fc1.weight.split((tokens.shape[-1], action.shape[-1]), dim=1)
        mixed = F.linear(tokens, by_token, self.fc1.bias)[None] + F.linear(action, by_action)[:, None]
        return self.fc3(F.relu(self.fc2(F.relu(mixed))))

    def mix(self, tokens: Float[Tensor, "n d"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b n d"]:
        return self(tokens, action)

    def action_weights(self) -> Float[Tensor, "d k"]:
        return self.fc1.weight[:, self.fc2.in_features :]


class SequenceConditioning(Conditioning):
    """Conditioning `sequence`: one token per action component, each from a separate linear layer (section 4.2).

    Weights have standard deviation 1, so that the initial tokens are about as large as the positions of the patches.
    The residual of the first block would dominate much smaller tokens.
    """

    module_name = "action_tokens"
    conditioned = True

    def __init__(self, width: int, action_size: int) -> None:
        super().__init__(width, action_size)
        self.weight = nn.Parameter(torch.empty(action_size, width))
        self.bias = nn.Parameter(torch.empty(action_size, width))
        nn.init.trunc_normal_(self.weight)
        nn.init.trunc_normal_(self.bias)

    @staticmethod
    def num_tokens(action_size: int) -> int:
        return action_size

    def forward(self, action: Float[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        return action[:, :, None] * self.weight + self.bias

    def append(self, tokens: Float[Tensor, "b s d"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b s2 d"]:
        return torch.cat((tokens, self(action).to(tokens.dtype)), dim=1)

    def action_weights(self) -> Float[Tensor, "d k"]:
        return self.weight.T


CONDITIONING: dict[str, type[Conditioning]] = {
    "none": Conditioning,
    "sequence": SequenceConditioning,
    "feature": FeatureConditioning,
}
"""Conditioning classes by their names in ActionConfig.conditioning."""


def num_action_tokens(config: Config) -> int:
    """Return the number of action tokens in each sequence of the predictor."""
    return CONDITIONING[config.action.conditioning].num_tokens(action_spec(config.action, config.views).size)


class Predictor(nn.Module):
    """ViT with its own width that maps context features to target features, conditioned on the action.

    `predict_masked` is the training task: visible and predicted positions in one grid. `predict_image` is the
    whole-image task of evaluation: every position is both context and query (2n tokens, paper section 5.1).
    """

    pos_embed: Tensor
    num_prefix_tokens = 0
    """Number of context tokens of `build_image_sequence` that are not patches."""

    def __init__(self, config: Config, action_size: int) -> None:
        super().__init__()
        width, encoder_width = config.predictor.embed_dim, config.encoder.embed_dim
        self.grid_size, self.action_size = config.grid_size, action_size
        self.grad_checkpointing = config.train.activation_checkpointing
        self.residual = config.train.residual_dtype
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("pos_embed", sincos_positions(width, config.grid_size), persistent=False)
        conditioning = CONDITIONING[config.action.conditioning]
        for kind in CONDITIONING.values():
            self.register_module(kind.module_name, None)
        self.register_module(conditioning.module_name, conditioning(width, action_size))
        self._conditioning = conditioning.module_name
        self.num_action_tokens = conditioning.num_tokens(action_size)
        """Number of tokens of the sequence that are not patches."""
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.predictor.num_heads,
                config.predictor.mlp_ratio,
                qkv_bias=True,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                **OWN_LAYERS,
            )
            for _ in range(config.predictor.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, encoder_width)
        init_weights(self, config.encoder.init, self.blocks)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def conditioned(self) -> bool:
        """True where the output depends on the action."""
        return self.conditioning.conditioned

    @property
    def conditioning(self) -> Conditioning:
        """Module that conditions the sequence on the action."""
        module: Conditioning = getattr(self, self._conditioning)
        return module

    def predict_masked(
        self, context: Float[Tensor, "1 t e"], masks: PackedMasks, action: Float[Tensor, "b k"]
    ) -> Float[Tensor, "1 s e"]:
        """Predict the target features of the tokens that the loss compares (masks.loss).

        context: packed features of the visible patches. Predicted positions hold a mask token. Positions that are
        neither are not attended to. One pass computes all m predictions of each image.
        """
        tokens = self.build_sequence(context, masks, action)
        tokens = forward_blocks(
            self.blocks,
            tokens,
            masks.predictor,
            selected=masks.loss.prediction_index,
            grad_checkpointing=self.grad_checkpointing,
        )
        return self.project(tokens)

    def build_sequence(
        self, context: Float[Tensor, "1 t e"], masks: PackedMasks, action: Float[Tensor, "b k"]
    ) -> Float[Tensor, "r s d"]:
        """Place context features and mask tokens at their grid positions: [b, n, d], or packed [1, t, d]."""
        b, m, n = masks.predicted.shape
        at = masks.context.token_index
        seen = add_positions(self.predictor_embed(context[0]), self.pos_embed[at % n], self.residual)
        tokens = scatter_tokens(seen, at, self.mask_queries(action).to(seen.dtype).flatten(0, 1)).unflatten(0, (b, n))
        tokens = self.append_action_tokens(tokens, action)
        if masks.predictor is None:
            return tokens
        return gather_tokens(tokens[:, None].expand(-1, m, -1, -1).flatten(0, 2), masks.predictor.token_index)[None]

    def project(self, tokens: Float[Tensor, "*b t d"]) -> Float[Tensor, "*b t e"]:
        """Return the predictions from the last block's output."""
        projected: Tensor = self.predictor_proj(self.norm(tokens))
        return projected

    def predict_image(self, context: Float[Tensor, "b n e"], action: Float[Tensor, "b k"]) -> Float[Tensor, "b n e"]:
        """Predict the features of the whole target image from those of the whole source image."""
        n = context.shape[1]
        tokens = forward_blocks(self.blocks, self.build_image_sequence(context, action))
        return self.predictor_proj(self.norm(tokens[:, n : 2 * n]))

    def build_image_sequence(
        self,
        context: Float[Tensor, "b n e"],
        action: Float[Tensor, "b k"],
        grid: tuple[int, int] | None = None,
        *,
        whole: bool = True,
    ) -> Float[Tensor, "b s d"]:
        """Build the input sequence where every position is visible: context, queries, action tokens if there are any.

        grid: rows and columns of the context; None: the training grid. Positions are interpolated for other grids.
        whole: a query for every position; else a single query without position (section 5.1).
        """
        positions = self.pos_embed if grid is None else self.interpolate_pos_embed(grid)
        seen = add_positions(self.predictor_embed(context), positions, self.residual)
        queries = self.mask_queries(action, positions if whole else positions.new_zeros(1, positions.shape[1]))
        tokens = self.append_action_tokens(torch.cat((seen, queries.to(seen.dtype)), dim=1), action)
        # In training every position occurs once, here twice. The action tokens are therefore appended twice; otherwise
        # their share of the attention would be halved and the action applied too weakly.
        return self.append_action_tokens(tokens, action) if whole else tokens

    def interpolate_pos_embed(self, grid: tuple[int, int]) -> Float[Tensor, "n d"]:
        """Return the positions of a grid (rows, columns), interpolated where it is not the training grid."""
        return resample_positions(self.pos_embed[None], (self.grid_size, self.grid_size), grid)[0]

    def mask_queries(
        self, action: Float[Tensor, "b k"], positions: Float[Tensor, "n d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Return the mask tokens of all positions, or of `positions`, with the action mixed in (`feature`)."""
        return self.conditioning.mix(self.mask_token + (self.pos_embed if positions is None else positions), action)

    def append_action_tokens(
        self, tokens: Float[Tensor, "b s d"], action: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b s2 d"]:
        """Append the action tokens where conditioning is `sequence`."""
        return self.conditioning.append(tokens, action)

"""Predictor finetuning: the predictor as a downstream model on an encoder's features (paper, 5.1, 5.2, A.2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int64
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from iwm.actions import action_spec
from iwm.config import Config
from iwm.encoder_outputs import LayerNormKind
from iwm.model_config import PredictorConfig
from iwm.models.attention import to_device
from iwm.models.backbone import Backbone, intermediate_layers
from iwm.models.external.loading import MaeDecoder
from iwm.models.layers import compile_blocks, forward_blocks, init_weights, set_drop_path
from iwm.models.predictor import Predictor
from iwm.models.predictor_shape import unconditioned
from iwm.train_config import AttentionImpl


class PredictorBackbone(nn.Module):
    """Predictor that is trained for a downstream task, on an encoder's features of whole images.

    Its output is the whole image (`image`: a query for every position, 2n tokens) or one token (`token`: one query
    without position, n + 1 tokens; table S3). The action enters as in pretraining: mixed into the queries, or as its
    own tokens. With the output `image` these tokens are appended twice (Predictor.build_image_sequence gives the
    reason). With `token` they are appended once, because the sequence is only one token longer than in pretraining.
    For several tasks, each has a learned token that every token attends to (5.2).
    """

    def __init__(
        self,
        predictor: Predictor | MaeDecoder,
        *,
        output: Literal["image", "token"] = "image",
        num_tasks: int = 0,
        drop_path: float = 0.0,
        grad_checkpointing: bool = False,
        return_layers_only: bool = False,
        seed: int = 0,
    ) -> None:
        """Wrap `predictor` itself for training.

        Pass a copy (copy_pretrained) or a new one (init_predictor, init_predictor_for, init_mae_decoder).
        num_tasks: number of task tokens. seed: seed of their initial values. drop_path: rate of the last block, linear
        over depth. return_layers_only: only get_intermediate_layers will be called, so the projection to the encoder's
        width is not trained.
        """
        super().__init__()
        self.predictor = predictor.requires_grad_(True).train()
        self.output, self.grad_checkpointing = output, grad_checkpointing
        first = predictor.blocks[0]
        assert isinstance(first, Block)  # for mypy: a ModuleList is typed as a list of modules
        self.num_heads: int = first.attn.num_heads
        if isinstance(predictor, Predictor):
            self.predictor_dim: int = predictor.predictor_proj.in_features
            """Width of the tokens inside the predictor and of get_intermediate_layers."""
            self.embed_dim: int = predictor.predictor_proj.out_features
            """Width of the predictions."""
            predictor.predictor_proj.requires_grad_(not return_layers_only)
        else:
            self.predictor_dim = self.embed_dim = predictor.decoder_embed.out_features
            # MAE's positions are fixed, and its pixel head is not used.
            predictor.decoder_pos_embed.requires_grad_(False)
            predictor.decoder_pred.requires_grad_(False)
        set_drop_path(predictor.blocks, drop_path)
        self.task_tokens: nn.Parameter | None = None
        if num_tasks:
            self.task_tokens = nn.Parameter(torch.empty(num_tasks, self.predictor_dim))
            with _fork_rng(seed):
                # About as large as the positions, like the action tokens; much smaller tokens vanish next to what the
                # first block adds.
                nn.init.trunc_normal_(self.task_tokens)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of context tokens before the patches: 1 (the class token) for MAE's decoder, else 0."""
        return self.predictor.num_prefix_tokens

    @property
    def conditioned(self) -> bool:
        """True where the output depends on an action."""
        return self.predictor.conditioned

    def forward(
        self,
        context: Float[Tensor, "b s e"],
        action: Float[Tensor, "b k"] | None = None,
        task: Int64[Tensor, " b"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b m o"]:
        """Return the predictions of all positions (m = n) or of the one query (m = 1), after norm and projection.

        context: an encoder's features, s = prefix + n. action: in the layout of iwm/actions.py; None: the null action.
        task: index of each image's task, where there are task tokens. grid: rows and columns of the context; None: the
        training grid.
        Raises ValueError where a task is given without task tokens, or the reverse.
        """
        tokens = self._sequence(context, action, task, grid, whole=self.output == "image")
        tokens = forward_blocks(self.predictor.blocks, tokens, grad_checkpointing=self.grad_checkpointing)
        num_queries = 1 if self.output == "token" else context.shape[1] - self.num_prefix_tokens
        predicted: Tensor = self.predictor.norm(tokens[:, context.shape[1] : context.shape[1] + num_queries])
        return self.predictor.predictor_proj(predicted) if isinstance(self.predictor, Predictor) else predicted

    def get_intermediate_layers(
        self,
        context: Float[Tensor, "b s e"],
        grid: tuple[int, int],
        count: int = 4,
        action: Float[Tensor, "b k"] | None = None,
        task: Int64[Tensor, " b"] | None = None,
        layer_norm: LayerNormKind = "shared",
    ) -> list[Float[Tensor, "b n d"]]:
        """Return the whole image's queries after each of the last `count` blocks (A.2, segmentation).

        Positions are interpolated where the grid is not the training grid. layer_norm: layers that pass the
        predictor's norm (intermediate_layers). Raises ConfigError where there are fewer blocks.
        """
        tokens = self._sequence(context, action, task, grid, whole=True)
        s = context.shape[1]
        queries = slice(s, 2 * s - self.num_prefix_tokens)
        return intermediate_layers(
            self.predictor.blocks, self.predictor.norm, tokens, count, queries, layer_norm, self.grad_checkpointing
        )

    def _sequence(
        self,
        context: Float[Tensor, "b s e"],
        action: Float[Tensor, "b k"] | None,
        task: Int64[Tensor, " b"] | None,
        grid: tuple[int, int] | None,
        whole: bool,
    ) -> Float[Tensor, "b s2 d"]:
        """Build the input of the first block: context, queries, action tokens, task token."""
        if (task is None) != (self.task_tokens is None):
            raise ValueError("task must be given if the predictor has task tokens (num_tasks > 0), and only then")
        if isinstance(self.predictor, Predictor):
            if action is None:
                action = torch.zeros(len(context), self.predictor.action_size, device=context.device)
            tokens = self.predictor.build_image_sequence(context, action, grid, whole=whole)
        else:
            tokens = self.predictor.build_image_sequence(context, grid, whole=whole)
        if self.task_tokens is None:
            return tokens
        return torch.cat((tokens, self.task_tokens[task][:, None].to(tokens.dtype)), dim=1)

    def setup(
        self, device: torch.device, *, compiled: bool = False, attention: AttentionImpl = "auto"
    ) -> PredictorBackbone:
        """Move to a device, select the attention kernel, and compile block by block if `compiled` (static shapes)."""
        to_device(self, device, attention)
        if compiled:
            compile_blocks(self.predictor, self.predictor.blocks, "build_image_sequence")
        return self


def copy_pretrained(predictor: Predictor | MaeDecoder) -> Predictor | MaeDecoder:
    """Return a copy of the pretrained predictor, or of MAE's decoder, with its own parameters."""
    return copy.deepcopy(predictor)


def init_predictor(config: Config, seed: int) -> Predictor:
    """Return a randomly initialised predictor of a run's architecture, on the CPU: the control of table 4.

    It depends on the seed alone and leaves the state of torch's generators unchanged.
    """
    with _fork_rng(seed):
        return Predictor(config, action_spec(config.action, config.views).size)


def init_predictor_for(backbone: Backbone, shape: PredictorConfig, seed: int) -> Predictor:
    """Return a randomly initialised, unconditioned predictor on the patches of an encoder that has none (table S1).

    Raises ConfigError, which names the option, where `shape` is impossible.
    """
    prefix = "--random-predictor."
    return init_predictor(
        unconditioned(backbone.embed_dim, backbone.img_size, backbone.patch_size, shape, prefix), seed
    )


def init_mae_decoder(decoder: MaeDecoder, seed: int) -> MaeDecoder:
    """Return a copy of MAE's decoder, reinitialised as in MAE's pretraining, on the CPU; fixed positions are kept."""
    initialised = copy.deepcopy(decoder).cpu()
    with _fork_rng(seed), torch.no_grad():
        init_weights(initialised, "xavier")
        nn.init.normal_(initialised.mask_token, std=0.02)
        for part in initialised.modules():
            if isinstance(part, nn.LayerNorm):
                part.reset_parameters()
    return initialised


@contextmanager
def _fork_rng(seed: int) -> Iterator[None]:
    """Seed the CPU's generator, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

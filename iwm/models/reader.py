"""The predictor kept: asked, for a downstream task, what it makes of an encoder's features (paper, 5.1, 5.2, A.2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int64
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dali_pipelines.augmentation import Views
from iwm.actions import action_spec
from iwm.config import Action, AttentionKind, Config, Encoder
from iwm.config import Predictor as Shape
from iwm.models.attention import settle
from iwm.models.backbone import Backbone, last_layers
from iwm.models.foreign import MaeDecoder
from iwm.models.layers import compile_parts, initialise, run_blocks, set_drop_path
from iwm.models.predictor import Predictor


class Reader(nn.Module):
    """A predictor in training for a downstream task, on an encoder's features of whole images.

    It is asked for the whole target (`image`: a query of every position, 2n tokens) or by one query that has no
    position (`token`: n + 1 tokens; table S3). The action enters as in pretraining, mixed into the queries or as tokens
    of its own: twice beside the whole image (Predictor.ask says why), once beside one query, where the sequence is as
    long as in pretraining but for one. Several tasks are told apart by a learned token each, which every token attends
    to (5.2).
    """

    def __init__(
        self,
        predictor: Predictor | MaeDecoder,
        *,
        query: Literal["image", "token"] = "image",
        tasks: int = 0,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        only_layers: bool = False,
        seed: int = 0,
    ) -> None:
        """Trains this very predictor: hand over `kept`, `fresh`, `fresh_for` or `fresh_decoder`.

        tasks: how many task tokens; seed: of their first values. drop_path: rate of the last block, linear over depth.
        only_layers: nothing but `layers` will be asked for, so the projection to the encoder's width is not trained.
        """
        super().__init__()
        self.predictor = predictor.requires_grad_(True).train()
        self.query, self.checkpointing = query, checkpointing
        first = predictor.blocks[0]
        assert isinstance(first, Block)  # a module list says only that it holds modules
        self.heads: int = first.attn.num_heads
        if isinstance(predictor, Predictor):
            self.inner_width: int = predictor.project.in_features
            """Of the tokens inside and of `layers`."""
            self.width: int = predictor.project.out_features
            """Of the predictions."""
            predictor.project.requires_grad_(not only_layers)
        else:
            self.inner_width = self.width = predictor.decoder_embed.out_features
            # Positions are fixed in MAE, and pixels are not asked for.
            predictor.decoder_pos_embed.requires_grad_(False)
            predictor.decoder_pred.requires_grad_(False)
        set_drop_path(predictor.blocks, drop_path)
        self.task_tokens: nn.Parameter | None = None
        if tasks:
            self.task_tokens = nn.Parameter(torch.empty(tasks, self.inner_width))
            with _seeded(seed):
                # About as large as positions, as the tokens of actions: the first block drowns smaller ones.
                nn.init.trunc_normal_(self.task_tokens)

    @property
    def prefix(self) -> int:
        """Tokens that the context has before its patches: 1 (the class token) for MAE's decoder, else 0."""
        return self.predictor.prefix

    @property
    def conditioned(self) -> bool:
        """Whether an action changes anything."""
        return self.predictor.conditioned

    def forward(
        self,
        context: Float[Tensor, "b s e"],
        action: Float[Tensor, "b k"] | None = None,
        task: Int64[Tensor, " b"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b m o"]:
        """What is predicted of every position (m = n) or by the one query (m = 1), after norm and projection.

        context: an encoder's features, s = prefix + n. action: iwm/actions.py's layout; None: the null action. task: of
        each image, where there are task tokens. grid: rows and columns of the context; None: those of training.
        Raises ValueError where a task is given and there are no task tokens, or the reverse.
        """
        tokens = self._sequence(context, action, task, grid, whole=self.query == "image")
        tokens = run_blocks(self.predictor.blocks, tokens, checkpointing=self.checkpointing)
        asked = 1 if self.query == "token" else context.shape[1] - self.prefix
        predicted: Tensor = self.predictor.norm(tokens[:, context.shape[1] : context.shape[1] + asked])
        return self.predictor.project(predicted) if isinstance(self.predictor, Predictor) else predicted

    def layers(
        self,
        context: Float[Tensor, "b s e"],
        grid: tuple[int, int],
        count: int = 4,
        action: Float[Tensor, "b k"] | None = None,
        task: Int64[Tensor, " b"] | None = None,
    ) -> list[Float[Tensor, "b n d"]]:
        """The whole image's queries as they leave each of the last `count` blocks, each after the norm.

        For segmentation (A.2); positions are interpolated where the grid is not training's. Raises ConfigError where
        there are fewer blocks.
        """
        tokens = self._sequence(context, action, task, grid, whole=True)
        s = context.shape[1]
        wanted = slice(s, 2 * s - self.prefix)
        return last_layers(self.predictor.blocks, self.predictor.norm, tokens, count, wanted, self.checkpointing)

    def _sequence(
        self,
        context: Float[Tensor, "b s e"],
        action: Float[Tensor, "b k"] | None,
        task: Int64[Tensor, " b"] | None,
        grid: tuple[int, int] | None,
        whole: bool,
    ) -> Float[Tensor, "b s2 d"]:
        """What enters the first block: context, queries, tokens of the action, the task's token."""
        if (task is None) != (self.task_tokens is None):
            raise ValueError("a task is given where there are task tokens, and only there")
        if isinstance(self.predictor, Predictor):
            if action is None:
                action = torch.zeros(len(context), self.predictor.action_size, device=context.device)
            tokens = self.predictor.ask(context, action, grid, whole=whole)
        else:
            tokens = self.predictor.ask(context, grid, whole=whole)
        if self.task_tokens is None:
            return tokens
        return torch.cat((tokens, self.task_tokens[task][:, None].to(tokens.dtype)), dim=1)

    def prepare(self, device: torch.device, *, compiled: bool = False, attention: AttentionKind = "auto") -> Reader:
        """Move to a device, choose the attention, compile block by block if asked (static shapes)."""
        settle(self, device, attention)
        if compiled:
            compile_parts(self.predictor, self.predictor.blocks, "ask")
        return self


def kept(predictor: Predictor | MaeDecoder) -> Predictor | MaeDecoder:
    """A copy of the pretrained predictor, or of MAE's decoder, with parameters of its own."""
    return copy.deepcopy(predictor)


def fresh(config: Config, seed: int) -> Predictor:
    """A predictor of a run's architecture as its pretraining began, on the CPU: the control of table 4.

    It depends on the seed alone and leaves torch's generators as they are.
    """
    with _seeded(seed):
        return Predictor(config, action_spec(config.action, config.views).size)


def fresh_for(backbone: Backbone, shape: Shape, seed: int) -> Predictor:
    """A predictor for an encoder that has none, told of no action, on its patches (table S1)."""
    encoder = Encoder(width=backbone.width, depth=backbone.depth, heads=backbone.heads, patch=backbone.patch)
    config = Config(
        views=Views(size=backbone.size), encoder=encoder, predictor=shape, action=Action(conditioning="none")
    )
    config.check()
    return fresh(config, seed)


def fresh_decoder(decoder: MaeDecoder, seed: int) -> MaeDecoder:
    """MAE's decoder as MAE's pretraining began, on the CPU; positions, which are fixed, stay."""
    made = copy.deepcopy(decoder).cpu()
    with _seeded(seed), torch.no_grad():
        initialise(made, "xavier")
        nn.init.normal_(made.mask_token, std=0.02)
        for part in made.modules():
            if isinstance(part, nn.LayerNorm):
                part.reset_parameters()
    return made


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The CPU's generator at this seed, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

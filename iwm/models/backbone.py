"""A backbone: one face of every encoder, ours or foreign, for the downstream protocols (paper, A.2)."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Real
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iwm.config import AttentionKind, ConfigError
from iwm.models.attention import settle
from iwm.models.encoder import Encoder
from iwm.models.foreign import ForeignEncoder
from iwm.models.layers import compile_parts, run_blocks, set_drop_path


class Backbone(nn.Module):
    """Features of whole images, from a context or target encoder or a foreign one.

    Images are uint8 or float grey levels from 0 to 255, of any height and width that are multiples of the patch; where
    they are not of the training size, positions are interpolated (bicubic).
    """

    def __init__(self, encoder: Encoder | ForeignEncoder, *, checkpointing: bool = False) -> None:
        """The face of this very encoder, none of which is copied. checkpointing: as train.activation_checkpointing."""
        super().__init__()
        self.encoder = encoder
        self.checkpointing = checkpointing
        vit = self.vit
        self.width: int = vit.embed_dim
        self.depth = len(vit.blocks)
        self.heads: int = vit.blocks[0].attn.num_heads
        self.prefix: int = vit.num_prefix_tokens
        """Tokens before the patches, that stand for none: class token and registers; 0 for ours."""
        self.size: int = vit.patch_embed.img_size[0]
        """Side in pixels of the images that positions were made for."""
        self.patch: int = vit.patch_embed.patch_size[0]

    @property
    def vit(self) -> VisionTransformer:
        return self.encoder.vit if isinstance(self.encoder, ForeignEncoder) else self.encoder

    def grid(self, pixels: Real[Tensor, "b h w 3"]) -> tuple[int, int]:
        """Rows and columns of patches. Raises ConfigError where a side is no multiple of the patch."""
        height, width = pixels.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ConfigError(
                f"images of {height}×{width} px cannot be cut into patches of {self.patch} px: "
                "both sides must be multiples of it"
            )
        return height // self.patch, width // self.patch

    def tokens(self, pixels: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        """All tokens after the last norm, s = prefix + n. Raises ConfigError where the size does not fit (grid)."""
        left = run_blocks(self.vit.blocks, self.embed(pixels), checkpointing=self.checkpointing)
        tokens: Tensor = self.vit.norm(left)
        return tokens

    def patches(self, pixels: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b n d"]:
        """`tokens` of the patches alone, row by row."""
        return self.tokens(pixels)[:, self.prefix :]

    def layers(self, pixels: Real[Tensor, "b h w 3"], count: int = 4) -> list[Float[Tensor, "b n d"]]:
        """The patches as they leave each of the last `count` blocks, each after the last norm (A.2, segmentation).

        The norm puts all of them on one scale, and leaves no parameter of the encoder without a gradient.
        """
        wanted = slice(self.prefix, None)
        return last_layers(self.vit.blocks, self.vit.norm, self.embed(pixels), count, wanted, self.checkpointing)

    def embed(self, pixels: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        """What enters the first block."""
        self.grid(pixels)
        return self.encoder.embed(pixels)

    def trained(self, *, drop_path: float = 0.0, checkpointing: bool = False) -> Backbone:
        """A copy to be finetuned: with gradients, in training mode, with drop path (linear over depth) up to this rate.

        Our fixed positions stay fixed; learned ones are trained, MAE's too, as in its own finetuning. What plays no
        part in the tokens (MAE's decoder, timm's pooling) is left out or left alone.
        """
        encoder = copy.deepcopy(self.encoder).requires_grad_(True)
        if isinstance(encoder, ForeignEncoder):
            encoder.decoder = None
            for unused in (encoder.vit.fc_norm, encoder.vit.attn_pool):
                if unused is not None:
                    unused.requires_grad_(False)
        else:
            encoder.pos_embed.requires_grad_(False)
        copied = Backbone(encoder, checkpointing=checkpointing)
        set_drop_path(copied.vit.blocks, drop_path)
        return copied.train()

    def prepare(self, device: torch.device, *, compiled: bool = False, attention: AttentionKind = "auto") -> Backbone:
        """Move to a device in channels-last, choose the attention, compile block by block if asked (static shapes)."""
        settle(self, device, attention)
        if compiled:
            compile_parts(self, self.vit.blocks, "embed")
        return self


def backbone_of(encoder: Encoder | ForeignEncoder) -> Backbone:
    """The face of an encoder that stays as it is: the encoder itself, without gradients, in evaluation mode."""
    return Backbone(encoder.requires_grad_(False)).eval()


def last_layers(
    blocks: nn.ModuleList | nn.Sequential,
    norm: nn.Module,
    tokens: Float[Tensor, "b s d"],
    count: int,
    wanted: slice,
    checkpointing: bool = False,
) -> list[Float[Tensor, "b m d"]]:
    """The wanted tokens as they leave each of the last `count` blocks, each after `norm`.

    Raises ConfigError where there are fewer blocks.
    """
    if not 1 <= count <= len(blocks):
        raise ConfigError(f"the last {count} layers are asked for, but there are {len(blocks)}")
    left = []
    for number, block in enumerate(blocks):
        tokens = run_blocks([block], tokens, checkpointing=checkpointing)
        if number >= len(blocks) - count:
            left.append(norm(tokens[:, wanted]))
    return left

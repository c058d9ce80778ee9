"""Backbone: common interface of pretrained and external encoders for the downstream protocols (paper, A.2)."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Real
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iwm.config import ConfigError
from iwm.encoder_outputs import LayerNormKind
from iwm.models.attention import to_device
from iwm.models.encoder import Encoder
from iwm.models.external.loading import ExternalEncoder
from iwm.models.layers import compile_blocks, forward_blocks, set_drop_path
from iwm.train_config import AttentionImpl


class Backbone(nn.Module):
    """Features of whole images, from a context encoder, a target encoder or an external encoder.

    Images are uint8 or float with values from 0 to 255. Height and width may be any multiples of the patch size; for
    sizes other than the training size, positions are interpolated (bicubic).
    """

    def __init__(self, encoder: Encoder | ExternalEncoder, *, grad_checkpointing: bool = False) -> None:
        """Wrap `encoder` without copying it. grad_checkpointing: as train.activation_checkpointing."""
        super().__init__()
        self.encoder = encoder
        self.grad_checkpointing = grad_checkpointing
        vit = self.vit
        self.embed_dim: int = vit.embed_dim
        self.depth = len(vit.blocks)
        self.num_heads: int = vit.blocks[0].attn.num_heads
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        """Number of tokens before the patches: class token and registers; 0 for this project's encoders."""
        self.has_class_token: bool = vit.has_class_token
        """True where the first prefix token is a class token."""
        self.img_size: int = vit.patch_embed.img_size[0]
        """Image side that the positions were made for (pixels)."""
        self.patch_size: int = vit.patch_embed.patch_size[0]

    @property
    def vit(self) -> VisionTransformer:
        return self.encoder.vit if isinstance(self.encoder, ExternalEncoder) else self.encoder

    def grid(self, pixels: Real[Tensor, "b h w 3"]) -> tuple[int, int]:
        """Return the rows and columns of patches. Raises ConfigError where a side is not a multiple of the patch."""
        height, width = pixels.shape[1:3]
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"images of {height}×{width} px cannot be cut into patches of {self.patch_size} px; "
                "both sides must be multiples of the patch"
            )
        return height // self.patch_size, width // self.patch_size

    def tokens(self, pixels: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        """Return all tokens after the last norm, s = prefix + n. Raises ConfigError as `grid` does."""
        outputs = forward_blocks(self.vit.blocks, self.embed(pixels), grad_checkpointing=self.grad_checkpointing)
        tokens: Tensor = self.vit.norm(outputs)
        return tokens

    def patches(self, pixels: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b n d"]:
        """Return the patch tokens of `tokens`, row-major, without the prefix."""
        return self.tokens(pixels)[:, self.num_prefix_tokens :]

    def get_intermediate_layers(
        self, pixels: Real[Tensor, "b h w 3"], count: int = 4, layer_norm: LayerNormKind = "shared"
    ) -> list[Float[Tensor, "b n d"]]:
        """Return the patch tokens after each of the last `count` blocks (A.2, segmentation).

        layer_norm: layers that pass the final norm (intermediate_layers).
        """
        patches = slice(self.num_prefix_tokens, None)
        return intermediate_layers(
            self.vit.blocks, self.vit.norm, self.embed(pixels), count, patches, layer_norm, self.grad_checkpointing
        )

    def embed(self, pixels: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        """Return the input tokens of the first block. Raises ConfigError as `grid` does."""
        self.grid(pixels)
        return self.encoder.embed(pixels)

    def finetune_copy(self, *, drop_path: float = 0.0, grad_checkpointing: bool = False) -> Backbone:
        """Return a copy for finetuning: with gradients, in training mode, with drop path.

        drop_path: rate of the last block, linear over depth. This project's fixed positions stay fixed; learned
        positions are trained, and so are MAE's, as in its own finetuning. Parts that do not contribute to the tokens
        are removed (MAE's decoder, I-JEPA's predictor) or frozen (timm's pooling).
        """
        encoder = copy.deepcopy(self.encoder).requires_grad_(True)
        if isinstance(encoder, ExternalEncoder):
            encoder.predictor = None
            for unused in (encoder.vit.fc_norm, encoder.vit.attn_pool):
                if unused is not None:
                    unused.requires_grad_(False)
        else:
            encoder.pos_embed.requires_grad_(False)
        copied = Backbone(encoder, grad_checkpointing=grad_checkpointing)
        set_drop_path(copied.vit.blocks, drop_path)
        return copied.train()

    def setup(self, device: torch.device, *, compiled: bool = False, attention: AttentionImpl = "auto") -> Backbone:
        """Move to a device in channels-last, select the attention kernel, and compile block by block if `compiled`."""
        to_device(self, device, attention)
        if compiled:
            compile_blocks(self, self.vit.blocks, "embed")
        return self


def frozen_backbone(encoder: Encoder | ExternalEncoder) -> Backbone:
    """Return a backbone that wraps `encoder` itself, without gradients and in evaluation mode."""
    return Backbone(encoder.requires_grad_(False)).eval()


def intermediate_layers(
    blocks: nn.ModuleList | nn.Sequential,
    norm: nn.Module,
    tokens: Float[Tensor, "b s d"],
    count: int,
    selected: slice,
    layer_norm: LayerNormKind = "shared",
    grad_checkpointing: bool = False,
) -> list[Float[Tensor, "b m d"]]:
    """Return the selected tokens after each of the last `count` blocks.

    layer_norm: `shared` passes all of them through `norm`, `last` the last block's alone; the other kinds do not use
    it. Raises ConfigError where there are fewer blocks.
    """
    if not 1 <= count <= len(blocks):
        raise ConfigError(f"count {count}: the model has {len(blocks)} blocks; use 1 to {len(blocks)}")
    layers = []
    for number, block in enumerate(blocks):
        tokens = forward_blocks([block], tokens, grad_checkpointing=grad_checkpointing)
        if number >= len(blocks) - count:
            normed = layer_norm == "shared" or (layer_norm == "last" and number == len(blocks) - 1)
            layers.append(norm(tokens[:, selected]) if normed else tokens[:, selected])
    return layers

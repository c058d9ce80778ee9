"""Encoder: timm's ViT, on all patches or on the visible ones (paper, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iwm.model_config import EncoderConfig as EncoderConfig
from iwm.models.block import OWN_LAYERS, Block
from iwm.models.layers import (
    add_positions,
    forward_blocks,
    init_weights,
    resample_positions,
    sincos_positions,
)
from iwm.packing import Packing
from iwm.train_config import ResidualDtype

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def patchify(images: Real[Tensor, "b h w 3"], patch: int) -> Real[Tensor, "b n p"]:
    """Cut images into patches in row-major order; the values of a patch are ordered row, column, channel."""
    b, height, width, channels = images.shape
    patches = images.reshape(b, height // patch, patch, width // patch, patch, channels)
    return patches.transpose(2, 3).reshape(b, -1, patch * patch * channels)


class Encoder(VisionTransformer):
    """timm's VisionTransformer with fixed 2-D sin-cos positions, no class token and no head.

    Parameters have timm's names and shapes, so `state_dict()` loads strictly into the VisionTransformer that
    `timm_arguments` describes. Context encoder and target encoder are instances of this class.

    Images are uint8 or float with values from 0 to 255. Positions are interpolated for sizes other than the training
    size.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, config: EncoderConfig, image_size: int, *, grad_checkpointing: bool = False) -> None:
        super().__init__(**timm_arguments(config, image_size), block_fn=Block, **OWN_LAYERS)
        self.patch_size = config.patch_size
        self.grad_checkpointing = grad_checkpointing
        self.residual: ResidualDtype = "auto"
        grid = image_size // config.patch_size
        self.pos_embed = nn.Parameter(sincos_positions(config.embed_dim, grid)[None], requires_grad=False)
        init_weights(self, config.init, self.blocks)
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self.register_buffer("pixel_scale", (1 / (255 * std)).repeat(config.patch_size**2), persistent=False)
        self.register_buffer("pixel_shift", (-mean / std).repeat(config.patch_size**2), persistent=False)

    def forward(
        self,
        images: Real[Tensor, "b h w 3"],
        packing: Packing | None = None,
        selected: Int64[Tensor, " s"] | None = None,
    ) -> Float[Tensor, "r t d"]:
        """Return features of all patches [b, n, d], of the packed ones [1, t, d], or of the selected ones [1, s, d].

        selected: as in `forward_blocks`.
        """
        tokens = forward_blocks(
            self.blocks,
            self.embed(images, packing),
            packing,
            selected=selected,
            grad_checkpointing=self.grad_checkpointing,
        )
        return self.norm(tokens)

    def embed(self, images: Real[Tensor, "b h w 3"], packing: Packing | None = None) -> Float[Tensor, "r t d"]:
        """Embed patches and add positions; with a packing, only the visible patches are normalised and embedded.

        This is the convolution of timm's PatchEmbed, written as a matrix product. Its weight is stored channels-last,
        so that it multiplies row-column-channel patches without a copy.
        """
        patches = patchify(images, self.patch_size)
        grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
        positions = resample_positions(self.pos_embed, self.patch_embed.grid_size, grid)
        if packing is not None:
            n = patches.shape[1]
            rows = patches.flatten(0, 1)
            # Padding tokens take the last patch of the batch.
            patches = rows.index_select(0, packing.token_index.clamp(max=len(rows) - 1))[None]
            positions = positions[:, packing.token_index % n]
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        pixels = patches * self.pixel_scale + self.pixel_shift
        return add_positions(F.linear(pixels, weight, self.patch_embed.proj.bias), positions, self.residual)


def timm_arguments(config: EncoderConfig, image_size: int) -> dict[str, object]:
    """Return the arguments of the timm VisionTransformer that an exported encoder loads into."""
    return {
        "img_size": image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
        "num_classes": 0,
    }

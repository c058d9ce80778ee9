"""The encoder: a stock timm ViT that can be given the visible patches alone (paper, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iwm.config import Encoder as EncoderConfig
from iwm.config import ResidualKind
from iwm.models.layers import (
    OWN_LAYERS,
    add_positions,
    initialise,
    resample_positions,
    rescale_by_depth,
    run_blocks,
    sincos_positions,
)
from iwm.packing import Packing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def patchify(images: Real[Tensor, "b h w 3"], patch: int) -> Real[Tensor, "b n p"]:
    """Cut into patches in row-major order; a patch's values run row, column, channel."""
    b, height, width, channels = images.shape
    patches = images.reshape(b, height // patch, patch, width // patch, patch, channels)
    return patches.transpose(2, 3).reshape(b, -1, patch * patch * channels)


class Encoder(VisionTransformer):
    """timm's VisionTransformer with fixed 2-D sin-cos positions, no class token and no head.

    Parameters carry timm's names and shapes, so `state_dict()` loads strictly into the VisionTransformer that
    `timm_arguments` describes. Context encoder and target encoder are two of these.

    Images are uint8, or float grey levels from 0 to 255. Where they are not of the training size, positions are
    interpolated.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, config: EncoderConfig, image_size: int, *, checkpointing: bool = False) -> None:
        super().__init__(**timm_arguments(config, image_size), **OWN_LAYERS)
        self.patch = config.patch
        self.checkpointing = checkpointing
        self.residual: ResidualKind = "auto"
        grid = image_size // config.patch
        self.pos_embed = nn.Parameter(sincos_positions(config.width, grid)[None], requires_grad=False)
        initialise(self, config.init)
        if config.init == "ijepa":
            rescale_by_depth(self.blocks)
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        self.register_buffer("pixel_scale", (1 / (255 * std)).repeat(config.patch**2), persistent=False)
        self.register_buffer("pixel_shift", (-mean / std).repeat(config.patch**2), persistent=False)

    def forward(self, images: Real[Tensor, "b h w 3"], packing: Packing | None = None) -> Float[Tensor, "r t d"]:
        """Features of all patches [b, n, d], or of those that are packed [1, t, d]."""
        tokens = self.embed(images, packing)
        return self.norm(run_blocks(self.blocks, tokens, packing, checkpointing=self.checkpointing))

    def embed(self, images: Real[Tensor, "b h w 3"], packing: Packing | None = None) -> Float[Tensor, "r t d"]:
        """Patch embedding with positions; only what is visible is normalised and embedded.

        The convolution of timm's PatchEmbed, written as the matrix product it is; its weight is kept channels-last, so
        that a row-column-channel patch meets it without a copy.
        """
        patches = patchify(images, self.patch)
        grid = (images.shape[1] // self.patch, images.shape[2] // self.patch)
        positions = resample_positions(self.pos_embed, self.patch_embed.grid_size, grid)
        if packing is not None:
            n = patches.shape[1]
            rows = patches.flatten(0, 1)
            # Filling shows the last patch of the batch.
            patches = rows.index_select(0, packing.place.clamp(max=len(rows) - 1))[None]
            positions = positions[:, packing.place % n]
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        pixels = patches * self.pixel_scale + self.pixel_shift
        return add_positions(F.linear(pixels, weight, self.patch_embed.proj.bias), positions, self.residual)


def timm_arguments(config: EncoderConfig, image_size: int) -> dict[str, object]:
    """Arguments of the timm VisionTransformer that an exported encoder loads into."""
    return {
        "img_size": image_size,
        "patch_size": config.patch,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
        "num_classes": 0,
    }

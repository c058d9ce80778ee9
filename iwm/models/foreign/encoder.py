"""A foreign encoder, whatever it was published as: uint8 images in, patch tokens out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iwm.models.foreign.decoder import MaeDecoder
from iwm.models.foreign.files import ForeignError


class ForeignEncoder(nn.Module):
    """A timm ViT with the normalisation that it was trained with. Frozen and in evaluation mode when it is loaded."""

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(
        self,
        kind: str,
        vit: VisionTransformer,
        mean: Sequence[float],
        std: Sequence[float],
        decoder: MaeDecoder | None = None,
    ) -> None:
        """mean, std: of the pixels from 0 to 1 that the ViT was trained on."""
        super().__init__()
        self.kind = kind
        self.vit = vit
        self.decoder = decoder
        """MAE's decoder on `tokens`, where it was asked for."""
        self.width: int = vit.embed_dim
        self.prefix: int = vit.num_prefix_tokens
        """Tokens that stand for no patch: the class token, and registers after it."""
        self.size, self.patch, self.grid = (
            pair[0] for pair in (vit.patch_embed.img_size, vit.patch_embed.patch_size, vit.patch_embed.grid_size)
        )
        deviation = torch.tensor(std, dtype=torch.float32)
        self.register_buffer("pixel_scale", 1 / (255 * deviation), persistent=False)
        self.register_buffer("pixel_shift", -torch.tensor(mean, dtype=torch.float32) / deviation, persistent=False)

    def forward(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b n d"]:
        """Features of every patch, row by row, after the last norm. Raises ForeignError for another image size."""
        return self.tokens(images)[:, self.prefix :]

    def class_token(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        """The class token after the last norm. Raises ForeignError where the encoder has none (I-JEPA)."""
        if not self.vit.has_class_token:
            raise ForeignError(f"{self.kind} has no class token: average the patches")
        return self.tokens(images)[:, 0]

    def tokens(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        """Class token and patches: s = prefix + n."""
        if tuple(images.shape[1:3]) != (self.size, self.size):
            raise ForeignError(
                f"images of {images.shape[1]}×{images.shape[2]} px, but the {self.kind} encoder was loaded for "
                f"{self.size}×{self.size}; load it with image_size={images.shape[1]}"
            )
        pixels = (images * self.pixel_scale + self.pixel_shift).permute(0, 3, 1, 2)
        tokens: Tensor = self.vit.forward_features(pixels)
        return tokens

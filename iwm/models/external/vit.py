"""External encoders as timm ViTs, and MAE's decoder as a predictor.

The paper's MAE rows finetune this decoder in place of a world model (tables 4, 5, S1, S5).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Real
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from iwm.models.external.formats import ExternalCheckpointError
from iwm.models.external.tensors import mlp_ratio_of
from iwm.models.layers import forward_blocks, resample_positions
from iwm.models.predictor import Predictor


class ExternalEncoder(nn.Module):
    """timm ViT with the pixel normalisation of its training.

    load_external returns it frozen and in evaluation mode.
    """

    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(
        self,
        kind: str,
        vit: VisionTransformer,
        mean: Sequence[float],
        std: Sequence[float],
        predictor: MaeDecoder | Predictor | None = None,
    ) -> None:
        """Initialise. mean, std: channel statistics of the pixels in [0, 1] that the ViT was trained on."""
        super().__init__()
        self.format = kind
        self.vit = vit
        self.predictor = predictor
        """MAE's decoder or I-JEPA's predictor on `tokens`; None where it was not loaded."""
        self.embed_dim: int = vit.embed_dim
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        """Number of tokens before the patches: the class token, and registers after it."""
        self.img_size, self.patch_size, self.grid_size = (
            pair[0] for pair in (vit.patch_embed.img_size, vit.patch_embed.patch_size, vit.patch_embed.grid_size)
        )
        # For images of another size, `tokens` raises an error and `embed` interpolates the positions.
        vit.patch_embed.strict_img_size = False
        deviation = torch.tensor(std, dtype=torch.float32)
        self.register_buffer("pixel_scale", 1 / (255 * deviation), persistent=False)
        self.register_buffer("pixel_shift", -torch.tensor(mean, dtype=torch.float32) / deviation, persistent=False)

    def forward(self, images: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b n d"]:
        """Return patch features, row-major, after the last norm.

        Raises ExternalCheckpointError for another image size.
        """
        return self.tokens(images)[:, self.num_prefix_tokens :]

    def class_token(self, images: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        """Return the class token after the last norm.

        Raises ExternalCheckpointError where the encoder has none (I-JEPA).
        """
        if not self.vit.has_class_token:
            raise ExternalCheckpointError(f"{self.format} has no class token; average the patches")
        return self.tokens(images)[:, 0]

    def tokens(self, images: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        """Return class token and patches, s = prefix + n. Raises ExternalCheckpointError for another image size."""
        if tuple(images.shape[1:3]) != (self.img_size, self.img_size):
            raise ExternalCheckpointError(
                f"images of {images.shape[1]}×{images.shape[2]} px, but the {self.format} encoder was loaded for "
                f"{self.img_size}×{self.img_size}; load it with image_size={images.shape[1]}"
            )
        tokens: Tensor = self.vit.norm(forward_blocks(self.vit.blocks, self.embed(images)))
        return tokens

    def embed(self, images: Real[Tensor, "b h w 3"]) -> Float[Tensor, "b s d"]:
        """Return the input tokens of the first block for images (uint8, or float from 0 to 255) of any size.

        As in timm, except that positions are interpolated as when an encoder is loaded for another size.
        """
        vit = self.vit
        pixels = (images * self.pixel_scale + self.pixel_shift).permute(0, 3, 1, 2)
        patches: Tensor = vit.patch_embed(pixels).flatten(1, -2)  # some timm models return rows and columns
        before = [token.expand(len(patches), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        placed = 0 if vit.no_embed_class else self.num_prefix_tokens
        tokens = patches if vit.no_embed_class else torch.cat((*before, patches), dim=1)
        if vit.pos_embed is not None:
            grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
            tokens = tokens + resample_positions(vit.pos_embed, vit.patch_embed.grid_size, grid, placed)
        if vit.no_embed_class:
            tokens = torch.cat((*before, tokens), dim=1)
        embedded: Tensor = vit.norm_pre(vit.pos_drop(tokens))
        return embedded


class MaeDecoder(nn.Module):
    """MAE's decoder with its published parameter names, on the whole-image task.

    All positions are visible and predicted.
    The context is the class token and all n patches, the queries are n mask tokens, as for this project's predictor
    (section 5.1). The queries are the output.
    """

    num_prefix_tokens = 1
    """Number of context tokens before the patches: the class token."""
    conditioned = False
    """True where the output depends on an action; it never does."""

    def __init__(self, width: int, own_width: int, depth: int, heads: int, hidden: int, grid: int, pixels: int) -> None:
        """Initialise. width: the encoder's width; own_width: the decoder's; hidden: width of the MLPs' hidden layer.

        grid: patches along a side; pixels: values of one patch.
        """
        super().__init__()
        self.grid_size = grid
        self.decoder_embed = nn.Linear(width, own_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, own_width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, own_width), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(
            Block(own_width, heads, mlp_ratio_of(hidden, own_width), qkv_bias=True, norm_layer=norm)
            for _ in range(depth)
        )
        self.decoder_norm = norm(own_width)
        self.decoder_pred = nn.Linear(own_width, pixels)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.decoder_blocks

    @property
    def norm(self) -> nn.LayerNorm:
        return self.decoder_norm

    def forward(self, tokens: Float[Tensor, "b s d"]) -> Float[Tensor, "b n e"]:
        """Predict features of every patch, after the norm, from an encoder's class token and patches (s = 1 + n)."""
        sequence = forward_blocks(self.decoder_blocks, self.build_image_sequence(tokens))
        predicted: Tensor = self.decoder_norm(sequence[:, tokens.shape[1] :])
        return predicted

    def build_image_sequence(
        self, tokens: Float[Tensor, "b s d"], grid: tuple[int, int] | None = None, *, whole: bool = True
    ) -> Float[Tensor, "b s2 d2"]:
        """Build the blocks' input: class token, patches, queries. grid, whole: as in Predictor.build_image_sequence."""
        positions: Tensor = self.decoder_pos_embed
        if grid is not None:
            positions = resample_positions(positions, (self.grid_size, self.grid_size), grid, prefix=1)
        context = self.decoder_embed(tokens) + positions
        queries = (self.mask_token + positions[:, 1:]) if whole else self.mask_token
        return torch.cat((context, queries.expand(len(tokens), -1, -1).to(context.dtype)), dim=1)

    def pixels(self, tokens: Float[Tensor, "b s d"]) -> Float[Tensor, "b n p"]:
        """Predict patches, normalised as in MAE's loss; the values of a patch are ordered row, column, channel."""
        predicted: Tensor = self.decoder_pred(self(tokens))
        return predicted

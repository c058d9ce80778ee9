"""Encoders of other projects as this project's: the same tensors, or the reason why they do not fit.

This project's encoder is a pre-norm ViT: learned biases everywhere, LayerNorm (ε 1e-6), GELU, no class token, added
positions, a norm after the last block. What differs from it is refused, because it would compute something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from iwm.model_config import EncoderConfig
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD, timm_arguments
from iwm.models.external.formats import ExternalCheckpointError, State
from iwm.models.external.tensors import abbreviated, depth_of, grid_of, mismatches, mlp_ratio_of, shape_of

_CANNOT = {
    r"(ls\d|layer_?scale\w*)\.|gamma_?\d|\.gamma$": "LayerScale",
    r"^reg(ister)?_tokens?$": "register tokens",
    r"\.(q|k)_norm\.": "norms of queries and keys",
    r"\.attn\.norm\.": "a norm inside attention",
    r"\.mlp\.norm\.": "a norm inside the MLP",
    r"\.mlp\.(w\d+|fc1_[gx])\.": "a gated MLP (SwiGLU)",
    r"^(norm_pre|ln_pre|patch_embed\.norm)\.": "a norm before the blocks",
    r"rel(ative)?_pos": "relative positions",
    r"\.attn\.[qkv]_(bias|proj\.)": "separate queries, keys and values",
}
"""Parts of other ViTs that this project's encoder does not have, by a pattern of their tensors' names."""

_NOT_ENCODER = re.compile(
    r"(cls_token|dist_token|mask_token|masked_embed)$|((module\.)?head|head_dist|fc_norm|attn_pool|pre_logits|decoder_\w+)(\.|$)"
)
"""Beginnings of names that are not used: tokens that are not patches, masks, pooling, heads and MAE's decoder."""


@dataclass(frozen=True)
class ConvertedEncoder:
    """An encoder's tensors by this project's names, in float32, and the settings that they fit."""

    tensors: State
    """Positions are [1, grid², d], without those of other tokens."""
    grid: int
    """Number of patches along a side of the image that the positions were made for."""
    other_positions: int
    """Number of positions left out: those of class and distillation token."""
    embed_dim: int
    depth: int
    patch_size: int
    mlp_ratio: float


def convert_encoder(state: Mapping[str, Any], path: Path) -> ConvertedEncoder:
    """Return the tensors of this project's encoder, from those of a ViT by timm's names.

    Tensors of _NOT_ENCODER are left out; every other one must fit. Raises ExternalCheckpointError where the ViT has
    parts that this project's encoder does not have, or tensors are missing, unexpected or of another shape.
    """
    encoder = {name: tensor for name, tensor in state.items() if not _NOT_ENCODER.match(name)}
    _refuse_other_parts(encoder, state, path)
    width, channels, *patch = shape_of(encoder, "patch_embed.proj.weight", 4, path)
    if channels != 3 or patch[0] != patch[1]:
        raise ExternalCheckpointError(
            f"{path}: patches of {patch[0]}×{patch[1]} px with {channels} channels; this project's are square, with 3"
        )
    hidden, _ = shape_of(encoder, "blocks.0.mlp.fc1.weight", 2, path)
    prefix = _positions_before_patches(state, path)
    grid = grid_of(encoder, "pos_embed", prefix, path)
    encoder["pos_embed"] = encoder["pos_embed"][:, prefix:]
    ratio = mlp_ratio_of(hidden, width)
    found = ConvertedEncoder(encoder, grid, prefix, width, depth_of(encoder, "blocks"), patch[0], ratio)
    problems = mismatches(_expected(found), encoder)
    if problems:
        raise ExternalCheckpointError(f"{path} does not match this project's encoder: {abbreviated(problems)}")
    encoder |= {name: tensor.float() for name, tensor in encoder.items()}
    return found


def _refuse_other_parts(encoder: State, state: Mapping[str, Any], path: Path) -> None:
    parts = {part: name for pattern, part in _CANNOT.items() for name in reversed(encoder) if re.search(pattern, name)}
    first, second = (encoder.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape[:1] == (2 * second.shape[-1],):
        parts["a gated MLP (SwiGLU)"] = "blocks.0.mlp.fc1.weight"
    described = [f"{part} ({name})" for part, name in parts.items()]
    if "pos_embed" not in encoder:
        described.append("no added positions (pos_embed)")
    if "norm.weight" not in encoder and "fc_norm.weight" in state:
        described.append("its last norm after the pooling (fc_norm)")
    described += [
        f"no bias in {name.removesuffix('.weight')}"
        for name in ("patch_embed.proj.weight", *(f"blocks.0.{layer}.weight" for layer in _WITH_BIAS))
        if name in encoder and f"{name.removesuffix('weight')}bias" not in encoder and not parts
    ]
    if described:
        raise ExternalCheckpointError(
            f"{path}: this project's encoder cannot represent this ViT, which has {', '.join(described)}; choose a "
            "plain ViT"
        )


_WITH_BIAS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def _positions_before_patches(state: Mapping[str, Any], path: Path) -> int:
    """Return the number of positions of class and distillation token, which some timm models do not give any."""
    tokens = sum(name in state for name in ("cls_token", "dist_token"))
    count = shape_of(state, "pos_embed", 3, path)[1] - tokens
    return tokens if count > 0 and math.isqrt(count) ** 2 == count else 0


def _expected(found: ConvertedEncoder) -> dict[str, Tensor]:
    """Return this project's encoder of the same size, as tensors without memory."""
    # No shape depends on the number of heads.
    config = EncoderConfig(found.embed_dim, found.depth, 1, found.patch_size, found.mlp_ratio)
    with torch.device("meta"):
        vit = VisionTransformer(**timm_arguments(config, found.grid * found.patch_size), weight_init="skip")
    expected: dict[str, Tensor] = vit.state_dict()
    return expected


def with_imagenet_pixels(tensors: State, mean: Sequence[float], std: Sequence[float]) -> State:
    """Return the encoder for pixels normalised with ImageNet's statistics, with the same features.

    mean, std: channel statistics of the pixels in [0, 1] that the encoder was trained on. The linear change from one
    normalisation to the other becomes a part of the patch embedding.
    """
    weight, bias = (tensors[f"patch_embed.proj.{name}"].double() for name in ("weight", "bias"))
    old_mean, old_std, new_mean, new_std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std, IMAGENET_MEAN, IMAGENET_STD)
    )
    shifted = bias + (weight * ((new_mean - old_mean) / old_std)).sum((1, 2, 3))
    scaled = weight * (new_std / old_std)
    return {**tensors, "patch_embed.proj.weight": scaled.float(), "patch_embed.proj.bias": shifted.float()}

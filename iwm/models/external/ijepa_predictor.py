"""I-JEPA's published predictor as this project's: names, positions, and the predictor built from the file alone.

It is this project's predictor without conditioning. Its positions are fixed and not read: for an image of any size they
are the sine-cosine of the grid, as for this project's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from iwm.actions import action_spec
from iwm.config import ConfigError
from iwm.model_config import PredictorConfig
from iwm.models.external.formats import ExternalCheckpointError, State
from iwm.models.external.tensors import abbreviated, depth_of, grid_of, mismatches, mlp_ratio_of, shape_of
from iwm.models.layers import sincos_positions
from iwm.models.predictor import Predictor
from iwm.models.predictor_shape import unconditioned

_NAMES = {"predictor_blocks.": "blocks.", "predictor_norm.": "norm."}
"""Beginnings of names in I-JEPA's predictor, and in this project's."""
POSITIONS = "predictor_pos_embed"


def our_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the names in I-JEPA's predictor by this project's, without those of its positions."""
    names = {}
    for name in state:
        beginning = next((theirs for theirs in _NAMES if name.startswith(theirs)), "")
        names[_NAMES.get(beginning, "") + name.removeprefix(beginning)] = name
    names.pop(POSITIONS, None)
    return names


def convert_predictor(state: Mapping[str, Any]) -> State:
    """Return I-JEPA's predictor by this project's names, in float32. It may be of another shape than this run's."""
    converted = {ours: state[name].float() for ours, name in our_names(state).items()}
    return {name: tensor.flatten() if name == "mask_token" else tensor for name, tensor in converted.items()}


def has_sincos_positions(state: Mapping[str, Any], path: Path) -> bool:
    """Return True where the positions of I-JEPA's predictor are those that this project's predictor computes.

    Raises ExternalCheckpointError where they are not those of a square.
    """
    if POSITIONS not in state:
        return True
    grid, width = grid_of(state, POSITIONS, 0, path), state[POSITIONS].shape[-1]
    found = state[POSITIONS][0].float()
    return width % 4 == 0 and torch.allclose(found, sincos_positions(width, grid), atol=1e-5)


def load_ijepa_predictor(
    state: Mapping[str, Tensor], vit: VisionTransformer, path: Path, heads: int | None
) -> Predictor:
    """Return the predictor of a file of I-JEPA, on the features of its encoder `vit` and for images of its size.

    heads: number of heads; None: as many as the encoder has, as in I-JEPA. Raises ExternalCheckpointError for missing,
    unexpected or misshapen tensors, for other positions, and for heads that do not divide the width.
    """
    if not has_sincos_positions(state, path):
        raise ExternalCheckpointError(f"{path}: {POSITIONS} is not the sine-cosine that this project computes")
    width, _ = shape_of(state, "predictor_embed.weight", 2, path)
    hidden, _ = shape_of(state, "predictor_blocks.0.mlp.fc1.weight", 2, path)
    shape = PredictorConfig(
        embed_dim=width,
        depth=depth_of(state, "predictor_blocks"),
        num_heads=heads or vit.blocks[0].attn.num_heads,
        mlp_ratio=mlp_ratio_of(hidden, width),
    )
    side, patch = vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0]
    try:
        config = unconditioned(vit.embed_dim, side, patch, shape, "its predictor's ")
    except ConfigError as error:
        raise ExternalCheckpointError(f"{path}: {error}; give --external.predictor-heads") from error
    predictor = Predictor(config, action_spec(config.action, config.views).size)
    converted = convert_predictor(state)
    problems = mismatches(predictor.state_dict(), converted)
    if problems:
        raise ExternalCheckpointError(f"{path}: its predictor does not match I-JEPA's: {abbreviated(problems)}")
    predictor.load_state_dict(converted, strict=True)
    return predictor

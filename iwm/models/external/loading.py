"""External encoders, loaded strictly from their published files (paper, tables 4, 5, 8, S1, S5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from iwm.models.external.formats import (
    FORMATS,
    ExternalCheckpointError,
    NoPredictorError,
    State,
    find_encoder,
    find_predictor,
    read_file,
)
from iwm.models.external.ijepa_predictor import load_ijepa_predictor
from iwm.models.external.tensors import abbreviated, depth_of, grid_of, mismatches, mlp_ratio_of, shape_of
from iwm.models.external.vit import ExternalEncoder, MaeDecoder
from iwm.models.layers import resample_positions
from iwm.models.predictor import Predictor
from shards.errors import one_line

__all__ = ["FORMATS", "ExternalCheckpointError", "ExternalEncoder", "MaeDecoder", "NoPredictorError", "load_external"]

HEADS: dict[str, dict[int, int]] = {
    "mae": {768: 12, 1024: 16, 1280: 16},
    "ijepa": {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16},
    "moco_v3": {384: 12, 768: 12, 1024: 16, 1280: 16},
    "dino": {192: 3, 384: 6, 768: 12},
    "ibot": {192: 3, 384: 6, 768: 12, 1024: 16},
    "timm": {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16},
}
"""Published number of attention heads by width, which a ViT's tensors alone do not determine."""
WITH_PREDICTOR = ("mae", "ijepa")
"""Formats whose files can have a predictor or decoder."""
DECODER_HEADS = {512: 16}
"""Published number of heads of MAE's decoder by width."""


def load_external(
    format_name: str,
    path: Path | str | None,
    *,
    name: str | None = None,
    image_size: int | None = None,
    heads: int | None = None,
    predictor: bool = False,
    predictor_heads: int | None = None,
) -> ExternalEncoder:
    """Load a published encoder, frozen and in evaluation mode, on the CPU.

    format_name: mae, ijepa, moco_v3, dino or ibot, from the published file (formats.py); or `timm`: the timm ViT
    `name`, from a file of its parameters or, with path None, from timm's pretrained weights (downloaded).
    image_size: side (pixels); for sizes other than the published one, positions are interpolated (bicubic).
    predictor: also load I-JEPA's predictor or MAE's decoder. heads, predictor_heads: number of heads, for widths that
    were never published.

    Raises ExternalCheckpointError for a file of another format (which the message names), for missing, unexpected or
    misshapen tensors (which it lists), and for options that the format does not support; its subclass NoPredictorError
    for `predictor` with a file that has none.
    """
    if predictor and format_name not in WITH_PREDICTOR:
        raise ExternalCheckpointError(
            f"only {' and '.join(WITH_PREDICTOR)} have a predictor or decoder, {format_name} has none"
        )
    if format_name == "timm":
        return _frozen(_load_timm(name, path, image_size))
    if format_name not in FORMATS:
        raise ExternalCheckpointError(f"format '{format_name}' does not exist; use one of {', '.join(FORMATS)}, timm")
    if path is None or name is not None:
        raise ExternalCheckpointError(f"{format_name} is loaded from its own file (path); a name is for format timm")
    path = Path(path)
    content = read_file(path)
    state = find_encoder(format_name, content, path)
    decoder = (
        {key: value for key, value in state.items() if key == "mask_token" or key.startswith("decoder_")}
        if format_name == "mae"
        else {}
    )
    vit = _published_vit(format_name, {key: state[key] for key in state if key not in decoder}, path, image_size, heads)
    loaded: MaeDecoder | Predictor | None = None
    if predictor and format_name == "mae":
        if not decoder:
            raise NoPredictorError(
                f"{path} holds MAE's encoder alone; files with the decoder are mae_visualize_vit_*.pth"
            )
        loaded = _decoder(decoder, vit, path, predictor_heads)
    elif predictor:
        tensors = find_predictor(format_name, content)
        if not tensors:
            raise NoPredictorError(f"{path} holds I-JEPA's encoders alone; published files have the predictor too")
        loaded = load_ijepa_predictor(tensors, vit, path, predictor_heads)
    return _frozen(ExternalEncoder(format_name, vit, IMAGENET_MEAN, IMAGENET_STD, loaded))


def _frozen(encoder: ExternalEncoder) -> ExternalEncoder:
    return encoder.requires_grad_(False).eval()


def _published_vit(
    format_name: str, state: State, path: Path, image_size: int | None, heads: int | None
) -> VisionTransformer:
    """Return a ViT with the width, depth, patch size and tensors of the file."""
    class_token = format_name != "ijepa"
    width, _, patch, _ = shape_of(state, "patch_embed.proj.weight", 4, path)
    hidden, _ = shape_of(state, "blocks.0.mlp.fc1.weight", 2, path)
    grid = grid_of(state, "pos_embed", int(class_token), path)
    vit = VisionTransformer(
        img_size=_size(image_size or grid * patch, patch),
        patch_size=patch,
        embed_dim=width,
        depth=depth_of(state, "blocks"),
        num_heads=_heads(heads, HEADS[format_name], width, "heads", path),
        mlp_ratio=mlp_ratio_of(hidden, width),
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=False,
        num_classes=0,
        weight_init="skip",
    )
    state = {**state, "pos_embed": _resampled(state["pos_embed"], grid, vit.patch_embed.grid_size[0], int(class_token))}
    _load_strictly(vit, state, path)
    return vit


def _decoder(state: State, vit: VisionTransformer, path: Path, heads: int | None) -> MaeDecoder:
    width, _ = shape_of(state, "decoder_embed.weight", 2, path)
    hidden, _ = shape_of(state, "decoder_blocks.0.mlp.fc1.weight", 2, path)
    grid, new_grid = grid_of(state, "decoder_pos_embed", 1, path), vit.patch_embed.grid_size[0]
    decoder = MaeDecoder(
        width=vit.embed_dim,
        own_width=width,
        depth=depth_of(state, "decoder_blocks"),
        heads=_heads(heads, DECODER_HEADS, width, "predictor_heads", path),
        hidden=hidden,
        grid=new_grid,
        pixels=3 * vit.patch_embed.patch_size[0] ** 2,
    )
    positions = _resampled(state["decoder_pos_embed"], grid, new_grid, 1)
    _load_strictly(decoder, {**state, "decoder_pos_embed": positions}, path)
    return decoder


def _load_timm(name: str | None, path: Path | str | None, image_size: int | None) -> ExternalEncoder:
    if name is None or not timm.is_model(name):
        raise ExternalCheckpointError(
            f"format timm needs the name of a timm ViT, such as vit_base_patch16_224; '{name}' is not one"
        )
    if path is None and not timm.get_pretrained_cfg(name).has_weights:
        raise ExternalCheckpointError(f"timm has no pretrained weights for {name}; give a file (path)")
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        vit = timm.create_model(name, pretrained=path is None, num_classes=0, **options)
    except (OSError, RuntimeError, TypeError) as error:
        detail = one_line(error)[:300]
        raise ExternalCheckpointError(
            f"timm could not create {name} ({detail}); give a file, or another image_size"
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise ExternalCheckpointError(f"{name} is a timm {type(vit).__name__}, not a VisionTransformer")
    if path is not None:
        path = Path(path)
        content = read_file(path)
        # A classifier's head is not part of the encoder.
        state = {key: value for key, value in content.items() if not str(key).startswith("head.")}
        if vit.pos_embed is not None:
            prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
            grid = grid_of(state, "pos_embed", prefix, path)
            state["pos_embed"] = _resampled(state["pos_embed"], grid, vit.patch_embed.grid_size[0], prefix)
        _load_strictly(vit, state, path)
    return ExternalEncoder("timm", vit, vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])


def _resampled(positions: Tensor, grid: int, new_grid: int, prefix: int) -> Tensor:
    return resample_positions(positions.float(), (grid, grid), (new_grid, new_grid), prefix)


def _load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    problems = mismatches(module.state_dict(), state)
    if problems:
        raise ExternalCheckpointError(f"{path} does not match the ViT: {abbreviated(problems)}")
    module.load_state_dict(state, strict=True)


def _heads(given: int | None, published: Mapping[int, int], width: int, option: str, path: Path) -> int:
    """Return the number of heads. option: its name in `load_external`; the protocols' is --external.OPTION."""
    heads, shown = given or published.get(width), f"--external.{option.replace('_', '-')}"
    if heads is None:
        widths = ", ".join(map(str, published))
        raise ExternalCheckpointError(
            f"{path}: a width of {width} was never published (known: {widths}); give {shown} (load_external: {option})"
        )
    if width % heads:
        raise ExternalCheckpointError(f"{shown} {heads} does not divide the width {width} of {path}")
    return heads


def _size(image_size: int, patch: int) -> int:
    if image_size % patch:
        raise ExternalCheckpointError(f"image_size {image_size} is not a multiple of the patch size, {patch} px")
    return image_size

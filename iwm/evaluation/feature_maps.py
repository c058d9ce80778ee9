"""PCA and attention maps of patch features.

PCA: the first three principal components of the target encoder's patch features as red, green and blue. Columns are
the target encoder (teacher), the context encoder (student), the predictor with the action that changes nothing and
with a strong action, and the target encoder on the view that this action makes. All are in the space of the loss
(layer-normed if the loss does so) and are projected on the same three directions: equal colours are equal features.

Attention: weights of the target encoder's last block. It has no class token, so the maps show the attention that each
patch receives from all patches, by head, and the attention of one patch to the others. 1 is an equal share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dali_pipelines.augmentations import IDENTITY, JITTER_OPS
from dali_pipelines.replay import apply_photometric
from dali_pipelines.views import Views
from iwm.actions import describe_action
from iwm.evaluation.bank import actions_from
from iwm.evaluation.colour_scale import ColourScale
from iwm.evaluation.common import EvalContext
from iwm.evaluation.figures import FigureTile, TileBlock, TileColumn, TileFigure, TileGroup, write_figures
from iwm.evaluation.result_table import ResultTable
from iwm.evaluation.settings import FeatureMapSettings, bank_augmentation
from iwm.models.attention import Attention
from iwm.models.encoder import Encoder
from iwm.models.world_model import WorldModel

VIEW_MAP = "teacher, the view"
"""Title of the map of the teacher's features of the view after the action."""


def strong_augmentation(views: Views, scenario: str | None = None) -> Float[Tensor, "1 p"]:
    """Return the parameters of a strong jitter: brightness at its lower bound, the other ops at their upper bound."""
    jitter = bank_augmentation(views, scenario, "--scenario")
    ends = [jitter.value_range(op)[number > 0] for number, op in enumerate(JITTER_OPS)]
    return torch.tensor([[*ends, *IDENTITY[len(JITTER_OPS) :]]])


def normalized_features(model: WorldModel, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Return an encoder's features in the space of the loss (layer-normed if the loss does so); float32."""
    return model.normalize_features(features.float())


@dataclass(frozen=True)
class PatchPCA:
    """First three principal components of features, and the range of colours."""

    mean: Float[Tensor, " d"]
    directions: Float[Tensor, "d 3"]
    low: Float[Tensor, " 3"]
    high: Float[Tensor, " 3"]
    explained: float
    """Share of the variance that the three components explain (0 to 1)."""

    def colours(self, features: Float[Tensor, "... d"]) -> Float[Tensor, "... 3"]:
        """Return red, green and blue (0 to 1)."""
        values = (features.double() - self.mean) @ self.directions
        return ((values - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1)


def fit_patch_pca(features: Float[Tensor, "n d"]) -> PatchPCA:
    """Fit three principal components; colours span the 1st to the 99th percentile of each."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(features))
    directions = vectors[:, -3:].flip(1)
    # The sign of a component is arbitrary: make its largest entry positive, so that colours are reproducible.
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    low, high = torch.quantile(centred @ directions, torch.tensor([0.01, 0.99]).to(features), dim=0)
    total = variances.clamp_min(0).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return PatchPCA(mean, directions, low, high, (variances[-3:].clamp_min(0).sum() / total).item())


@torch.no_grad()
def patch_features(
    model: WorldModel, images: UInt8[Tensor, "b h w 3"], params: Float[Tensor, "1 p"]
) -> tuple[UInt8[Tensor, "b h w 3"], dict[str, Float[Tensor, "b n d"]]]:
    """Apply `params` to clean images; return the views and all patch features that are shown, by column title."""
    params = params.to(images.device).expand(len(images), -1)
    views = apply_photometric(images, params, model.config.views.jitter_impl)
    identity = torch.tensor(IDENTITY, device=images.device).expand_as(params)
    teacher = model.encode(images, "teacher")
    return views, {
        "teacher": normalized_features(model, teacher),
        "student": normalized_features(model, model.encode(images, "student")),
        "predicted, null action": model.predict(teacher, actions_from(identity, model.action_spec)).float(),
        "predicted, the action": model.predict(teacher, actions_from(params, model.action_spec)).float(),
        VIEW_MAP: normalized_features(model, model.encode(views, "teacher")),
    }


def component_figure(
    keys: Sequence[str],
    images: UInt8[Tensor, "b h w 3"],
    views: UInt8[Tensor, "b h w 3"],
    features: dict[str, Float[Tensor, "b n d"]],
    components: Sequence[PatchPCA],
    action: str,
) -> TileFigure:
    """Return the figure of the PCA maps, one block per image. `components`: one PCA per image."""
    groups = []
    for i, key in enumerate(keys):
        maps = {name: _square(components[i].colours(patches[i])) for name, patches in features.items()}
        tiles = {
            name: FigureTile((255 * colours).round().byte().cpu(), f"photograph {key}: components, {name}", exact=True)
            for name, colours in maps.items()
        }
        of_view = {
            "the view": FigureTile(views[i], f"photograph {key} after the action"),
            VIEW_MAP: tiles.pop(VIEW_MAP),
        }
        groups.append(_group(key, {"image": FigureTile(images[i], f"photograph {key}"), **tiles, **of_view}))
    explained = sum(pca.explained for pca in components) / len(components)
    caption = (
        "The first three principal components of the patch features as red, green and blue; equal colours are equal "
        f"features. They explain {explained:.0%} of the variance of the teacher's features. Null action: changes "
        f"nothing. The action: {action}. A world model makes 'predicted, the action' look like 'teacher, the view'."
    )
    return TileFigure("Principal components", caption, groups)


def attention_figure(
    keys: Sequence[str], images: UInt8[Tensor, "b h w 3"], weights: Float[Tensor, "b heads n n"], query: int
) -> TileFigure:
    """Return the figure of the attention maps, one block per image. `query`: row-major index of the framed patch."""
    heads, n = weights.shape[1], weights.shape[3]
    by_head = attention_received(weights)
    own = weights[:, :, query].mean(1) * n
    most = max(2.0, torch.quantile(by_head.double().flatten()[:: max(1, by_head.numel() // 2**20)], 0.99).item())
    # Square root scale: a few patches receive most of the attention, and the others would all be dark.
    scale = ColourScale(0.0, most, power=0.5)
    groups = []
    for i, key in enumerate(keys):
        maps = {"from the patch": own[i], "received": by_head[i].mean(0)}
        maps |= {f"head {head + 1}": by_head[i, head] for head in range(heads)}
        tiles = {
            name: FigureTile(scale.colours(_square(values)), f"photograph {key}: attention, {name}", exact=True)
            for name, values in maps.items()
        }
        framed = FigureTile(_framed(images[i], query, round(n**0.5)), f"photograph {key}, the patch is framed")
        groups.append(_group(key, {"image": framed, **tiles}))
    caption = (
        "Last block of the teacher: attention of the framed patch to the others, averaged over heads; attention that "
        "each patch receives from all patches, averaged over heads and by head."
    )
    return TileFigure("Attention", caption, groups, scale=scale.bar("attention, 1 = equal share"))


def _group(key: str, tiles: dict[str, FigureTile]) -> TileGroup:
    return TileGroup(key, [TileBlock("", [TileColumn(name, (tile,)) for name, tile in tiles.items()])])


def _framed(image: UInt8[Tensor, "h w 3"], patch: int, grid: int) -> UInt8[Tensor, "h w 3"]:
    """Return the image with a white frame, edged in black, around a patch (row-major index)."""
    side = len(image) // grid
    framed, (row, column) = image.clone(), divmod(patch, grid)
    inside = image[row * side : (row + 1) * side, column * side : (column + 1) * side]
    edge = max(1, side // 8)
    for out, level in ((edge, 0), (0, 255)):
        y, x = (max(0, place * side - out) for place in (row, column))
        framed[y : (row + 1) * side + out, x : (column + 1) * side + out] = level
    framed[row * side + edge : (row + 1) * side - edge, column * side + edge : (column + 1) * side - edge] = inside[
        edge : side - edge, edge : side - edge
    ]
    return framed


def _square(values: Float[Tensor, "n ..."]) -> Float[Tensor, "g g ..."]:
    grid = round(len(values) ** 0.5)
    return values.unflatten(0, (grid, grid))


def evaluate(context: EvalContext, settings: FeatureMapSettings, output: Path) -> dict[str, Any]:
    """Return the images' keys, explained variance and entropy by head, and both figures.

    Raises ConfigError for invalid settings and missing sample keys.
    """
    images, keys = _images(context, settings)
    params = strong_augmentation(context.config.views, settings.scenario)
    views, features = patch_features(context.model, images, params)
    teacher = features["teacher"]
    if settings.pca == "together":
        components = [fit_patch_pca(teacher.flatten(0, 1))] * len(images)
    else:
        components = [fit_patch_pca(patches) for patches in teacher]
    spec = context.model.action_spec
    action = describe_action(actions_from(params, spec)[0], spec)
    # One image at a time: the attention weights of a ViT-L are 16 × 196 × 196 per image.
    weights = torch.cat([last_attention(context.model.target_encoder, image[None]) for image in images])
    grid = round(teacher.shape[1] ** 0.5)
    query = int(settings.query[0] * grid) * grid + int(settings.query[1] * grid)
    figures = [
        component_figure(keys, images, views, features, components, action),
        attention_figure(keys, images, weights, query),
    ]
    return {
        "keys": keys,
        "action": action,
        "explained": sum(pca.explained for pca in components) / len(components),
        "entropy": attention_entropy(weights).mean(0).tolist(),
        **write_figures(figures, output),
    }


def _images(context: EvalContext, settings: FeatureMapSettings) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
    if settings.keys:
        return context.images_of(settings.keys), list(settings.keys)
    generator = torch.Generator().manual_seed(settings.seed)
    return context.random_images(settings.num_images, generator)


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the attention entropy of each head."""
    rows = [[str(head), f"{value:.2f}"] for head, value in enumerate(result["entropy"], start=1)]
    title = f"Feature maps of {len(result['keys'])} images"
    caption = f"Three components explain {result['explained']:.0%} of the variance of the teacher's patch features."
    columns = ["head of the last block", "attention entropy, share of the maximum"]
    return [ResultTable(title, columns, rows, caption)]


@torch.no_grad()
def attention_weights(module: Attention, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n n"]:
    """Return the attention weights of a module, rows (queries) summing to 1; float32.

    `x`: input of the module, the block's tokens after the norm.
    """
    with torch.autocast(x.device.type, enabled=False):
        q, k, _ = module.qkv(x.float()).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = module.q_norm(q), module.k_norm(k)
        weights: Tensor = (q * module.scale @ k.transpose(2, 3)).softmax(dim=3)
    return weights


@torch.no_grad()
def last_attention(encoder: Encoder, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b heads n n"]:
    """Return the attention weights of the encoder's last block on whole images."""
    module = encoder.blocks[-1].attn
    captured: list[Tensor] = []

    def capture(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        captured.append(inputs[0])

    hook = module.register_forward_pre_hook(capture)
    try:
        encoder(images)
    finally:
        hook.remove()
    return attention_weights(module, captured[0])


def attention_received(weights: Float[Tensor, "b heads n n"]) -> Float[Tensor, "b h n"]:
    """Return the attention that each patch receives, averaged over queries and times n: 1 is an equal share."""
    return weights.mean(2) * weights.shape[3]


def attention_entropy(weights: Float[Tensor, "b heads n n"]) -> Float[Tensor, "b h"]:
    """Return the mean attention entropy of each head as a share of the maximum: 0 one patch, 1 uniform."""
    if weights.shape[3] == 1:
        return torch.ones_like(weights[:, :, 0, 0])
    return -torch.special.xlogy(weights, weights).sum(3).mean(2) / math.log(weights.shape[3])

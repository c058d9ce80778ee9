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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from dali_pipelines.augmentations import IDENTITY, JITTER_OPS, Views
from dali_pipelines.replay import apply_photometric
from iwm.actions import describe_action
from iwm.evaluation.bank import actions_from
from iwm.evaluation.common import EvalContext
from iwm.evaluation.result_table import ResultTable
from iwm.evaluation.settings import FeatureMapSettings, bank_augmentation
from iwm.models.attention import Attention
from iwm.models.encoder import Encoder
from iwm.models.world_model import WorldModel


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
        "predicted:\nnull action": model.predict(teacher, actions_from(identity, model.action_spec)).float(),
        "predicted:\nthe action": model.predict(teacher, actions_from(params, model.action_spec)).float(),
        "teacher\nof the view": normalized_features(model, model.encode(views, "teacher")),
    }


def draw_components(
    images: UInt8[Tensor, "b h w 3"],
    views: UInt8[Tensor, "b h w 3"],
    features: dict[str, Float[Tensor, "b n d"]],
    components: list[PatchPCA],
    action: str,
    path: Path,
) -> None:
    """Write the PCA maps as PNG, one row per image. `components`: one PCA per image."""
    columns = ["image", *list(features)[:-1], "the view", list(features)[-1]]
    figure, axes = _grid(len(images), len(columns))
    for i, line in enumerate(axes):
        maps = {name: _square(components[i].colours(patches[i])) for name, patches in features.items()}
        shown = {"image": images[i], "the view": views[i], **maps}
        for ax, name in zip(line, columns, strict=True):
            _show(ax, shown[name], name if i == 0 else "")
    figure.suptitle(f"Principal components of patch features. Action: {action}", fontsize=9)
    figure.savefig(path, dpi=150)


def draw_attention(
    images: UInt8[Tensor, "b h w 3"], weights: Float[Tensor, "b heads n n"], query: int, path: Path
) -> None:
    """Write the attention maps as PNG, one row per image. `query`: row-major index of the patch marked +."""
    heads, n = weights.shape[1], weights.shape[3]
    by_head = attention_received(weights)
    figure, axes = _grid(len(images), 3 + heads)
    own = weights[:, :, query].mean(1) * n
    most = max(2.0, torch.quantile(by_head.double().flatten()[:: max(1, by_head.numel() // 2**20)], 0.99).item())
    side = images.shape[1] / n**0.5
    for i, line in enumerate(axes):
        top = i == 0
        _show(line[0], images[i], "image" if top else "")
        row, column = divmod(query, round(n**0.5))
        line[0].plot((column + 0.5) * side - 0.5, (row + 0.5) * side - 0.5, "+", color="white", markersize=9)
        _show(line[1], _square(own[i]), "from patch +" if top else "", most)
        _show(line[2], _square(by_head[i].mean(0)), "received" if top else "", most)
        for head in range(heads):
            _show(line[3 + head], _square(by_head[i, head]), f"head {head + 1}" if top else "", most)
    bar = figure.colorbar(axes[0, 1].images[0], ax=axes, shrink=0.6, aspect=30)
    bar.set_label("attention, 1 = equal share", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=150)


def _grid(rows: int, columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(1.1 * columns + 0.7, 1.1 * rows + 0.7), layout="constrained", facecolor="white")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(ax: Axes, picture: Tensor, title: str, most: float | None = None) -> None:
    # Square root scale: a few patches receive most of the attention, and the others would all be black.
    norm = PowerNorm(0.5, vmin=0, vmax=most) if most else None
    ax.imshow(picture.cpu().numpy(), interpolation="nearest", cmap="viridis", norm=norm)
    ax.set_axis_off()
    ax.set_title(title, fontsize=8)


def _square(values: Float[Tensor, "n ..."]) -> Float[Tensor, "g g ..."]:
    grid = round(len(values) ** 0.5)
    return values.unflatten(0, (grid, grid))


def evaluate(context: EvalContext, settings: FeatureMapSettings, output: Path) -> dict[str, Any]:
    """Draw both figures next to `output`; return their images, explained variance and entropy by head.

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
    pictures = [output.with_suffix(".png"), output.with_name(f"{output.stem}-attention.png")]
    draw_components(images, views, features, components, action, pictures[0])
    # One image at a time: the attention weights of a ViT-L are 16 × 196 × 196 per image.
    weights = torch.cat([last_attention(context.model.target_encoder, image[None]) for image in images])
    grid = round(teacher.shape[1] ** 0.5)
    query = int(settings.query[0] * grid) * grid + int(settings.query[1] * grid)
    draw_attention(images, weights, query, pictures[1])
    return {
        "keys": keys,
        "action": action,
        "explained": sum(pca.explained for pca in components) / len(components),
        "entropy": attention_entropy(weights).mean(0).tolist(),
        "picture": pictures[0].name,
        "attention_picture": pictures[1].name,
    }


def _images(context: EvalContext, settings: FeatureMapSettings) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
    if settings.keys:
        return context.images_of(settings.keys), list(settings.keys)
    generator = torch.Generator().manual_seed(settings.seed)
    return context.random_images(settings.num_images, generator)


def tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the attention entropy of each head."""
    rows = [[str(head), f"{value:.2f}"] for head, value in enumerate(result["entropy"], start=1)]
    title = f"Feature maps of {len(result['keys'])} images: {result['picture']}, {result['attention_picture']}"
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

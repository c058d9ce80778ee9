"""Patch features as pictures: their principal components as colours, and the last block's attention.

PCA: three principal components of the target encoder's patch features shown as red, green and blue, for the target
encoder (teacher), the context encoder (student), the predictor with the action that changes nothing and with a strong
one, and the target encoder of the view that this action makes. All are features as predictions are trained to be
(layer-normed where the loss has it) and go through the same three directions: equal colours are equal features.

Attention: the target encoder's last block. It has no class token, so what is shown is how much a patch receives from
all, in each head, and what one patch attends to. In both, 1 is an equal share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from dali_pipelines.augmentation import IDENTITY, JITTER_FIELDS, Views
from dali_pipelines.replay import photometric
from iwm.actions import describe
from iwm.config import ConfigError
from iwm.evaluation.attention_maps import entropy, last_attention, received
from iwm.evaluation.bank import actions_to
from iwm.evaluation.mrr import JITTERED, bank_jitter
from iwm.evaluation.settings import Settings as Common
from iwm.evaluation.subject import Subject
from iwm.models.world_model import WorldModel


@dataclass(frozen=True)
class Settings(Common):
    """Attention and PCA maps of patch features. Writes RUN/eval/maps.png and maps-attention.png beside the JSON."""

    images: int = 6
    """Held-out images, chosen at random by the seed."""
    keys: tuple[str, ...] = ()
    """Or the images of these sample keys."""
    pca: Literal["together", "each"] = "together"
    """`together`: directions and colours of all shown images, so that they compare. `each`: of every image alone."""
    query: tuple[float, float] = (0.5, 0.5)
    """Patch whose own attention is shown: height and width from the upper left corner, as shares of the image."""
    scenario: Annotated[str | None, tyro.conf.arg(metavar="|".join(JITTERED))] = None
    """Row of table S2 whose target jitter the strong action is of. Default: the run's own, or that of `default`."""


def strong_params(views: Views, scenario: str | None = None) -> Float[Tensor, "1 7"]:
    """A strong jitter: brightness at the lower end of its range, contrast, saturation and hue at the upper."""
    jitter = bank_jitter(views, scenario)
    ends = [jitter.jitter_range(name)[name != "brightness"] for name in JITTER_FIELDS]
    return torch.tensor([[*ends, *IDENTITY[len(JITTER_FIELDS) :]]])


def as_targets(model: WorldModel, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """An encoder's features as predictions are trained to be; float32."""
    features = features.float()
    return F.layer_norm(features, features.shape[-1:]) if model.config.loss.target_norm else features


@dataclass(frozen=True)
class Components:
    """Three principal directions of features, and the range of colours."""

    mean: Float[Tensor, " d"]
    directions: Float[Tensor, "d 3"]
    low: Float[Tensor, " 3"]
    high: Float[Tensor, " 3"]
    explained: float
    """Share of the variance that the three hold."""

    def colours(self, features: Float[Tensor, "... d"]) -> Float[Tensor, "... 3"]:
        """Red, green and blue from 0 to 1."""
        values = (features.double() - self.mean) @ self.directions
        return ((values - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1)


def principal(features: Float[Tensor, "n d"]) -> Components:
    """Principal components of patch features; colours span the 1st to the 99th percentile of each."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(features))
    directions = vectors[:, -3:].flip(1)
    # A direction is one up to its sign: the largest entry is made positive, so that colours come out the same again.
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    low, high = torch.quantile(centred @ directions, torch.tensor([0.01, 0.99]).to(features), dim=0)
    total = variances.clamp_min(0).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Components(mean, directions, low, high, (variances[-3:].clamp_min(0).sum() / total).item())


@torch.no_grad()
def patch_features(
    model: WorldModel, images: UInt8[Tensor, "b h w 3"], params: Float[Tensor, "1 p"]
) -> tuple[UInt8[Tensor, "b h w 3"], dict[str, Float[Tensor, "b n d"]]]:
    """The views that `params` make of clean images, and patch features of all kinds that are shown, by their names."""
    params = params.to(images.device).expand(len(images), -1)
    views = photometric(images, params, model.config.views.colour)
    identity = torch.tensor(IDENTITY, device=images.device).expand_as(params)
    teacher = model.encode(images, "teacher")
    return views, {
        "teacher": as_targets(model, teacher),
        "student": as_targets(model, model.encode(images, "student")),
        "predicted:\nnothing": model.predict(teacher, actions_to(identity, model.action_spec)).float(),
        "predicted:\nthe action": model.predict(teacher, actions_to(params, model.action_spec)).float(),
        "teacher\nof the view": as_targets(model, model.encode(views, "teacher")),
    }


def draw_components(
    images: UInt8[Tensor, "b h w 3"],
    views: UInt8[Tensor, "b h w 3"],
    features: dict[str, Float[Tensor, "b n d"]],
    components: list[Components],
    action: str,
    path: Path,
) -> None:
    """Write the PCA maps as PNG, a row per image. `components`: of each image."""
    columns = ["image", *list(features)[:-1], "the view", list(features)[-1]]
    figure, axes = _grid(len(images), len(columns))
    for i, line in enumerate(axes):
        maps = {name: _square(components[i].colours(each[i])) for name, each in features.items()}
        shown = {"image": images[i], "the view": views[i], **maps}
        for ax, name in zip(line, columns, strict=True):
            _show(ax, shown[name], name if i == 0 else "")
    figure.suptitle(f"Principal components of patch features. The action: {action}", fontsize=9)
    figure.savefig(path, dpi=150)


def draw_attention(images: UInt8[Tensor, "b h w 3"], weights: Float[Tensor, "b h n n"], query: int, path: Path) -> None:
    """Write the attention maps as PNG, a row per image; `query` is the patch, row-major, whose own is shown."""
    heads, n = weights.shape[1], weights.shape[3]
    by_head = received(weights)
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
    # The root of attention: a few patches take most of it, and the others would all be black.
    norm = PowerNorm(0.5, vmin=0, vmax=most) if most else None
    ax.imshow(picture.cpu().numpy(), interpolation="nearest", cmap="viridis", norm=norm)
    ax.set_axis_off()
    ax.set_title(title, fontsize=8)


def _square(values: Float[Tensor, "n ..."]) -> Float[Tensor, "g g ..."]:
    grid = round(len(values) ** 0.5)
    return values.unflatten(0, (grid, grid))


def evaluate(subject: Subject, settings: Settings, output: Path) -> dict[str, Any]:
    """Draw both pictures beside `output`; returns what they show, the components' share and the heads' entropy.

    Raises ConfigError for settings that cannot be and for keys that are not there.
    """
    if not all(0 <= share < 1 for share in settings.query):
        raise ConfigError(f"--query {settings.query[0]:g} {settings.query[1]:g}: two shares from 0 to below 1")
    images, keys = _images(subject, settings)
    params = strong_params(subject.config.views, settings.scenario)
    views, features = patch_features(subject.model, images, params)
    teacher = features["teacher"]
    if settings.pca == "together":
        components = [principal(teacher.flatten(0, 1))] * len(images)
    else:
        components = [principal(each) for each in teacher]
    spec = subject.model.action_spec
    action = describe(actions_to(params, spec)[0], spec)
    pictures = [output.with_suffix(".png"), output.with_name(f"{output.stem}-attention.png")]
    draw_components(images, views, features, components, action, pictures[0])
    # An image at a time: a ViT-L's weights of one are 16 heads of 196 by 196.
    weights = torch.cat([last_attention(subject.model.target_encoder, image[None]) for image in images])
    grid = round(teacher.shape[1] ** 0.5)
    query = int(settings.query[0] * grid) * grid + int(settings.query[1] * grid)
    draw_attention(images, weights, query, pictures[1])
    return {
        "keys": keys,
        "action": action,
        "explained": sum(each.explained for each in components) / len(components),
        "entropy": entropy(weights).mean(0).tolist(),
        "picture": pictures[0].name,
        "attention_picture": pictures[1].name,
    }


def _images(subject: Subject, settings: Settings) -> tuple[UInt8[Tensor, "b h w 3"], list[str]]:
    if settings.keys:
        return subject.images_of(settings.keys), list(settings.keys)
    if settings.images < 1:
        raise ConfigError(f"--images {settings.images}: at least 1")
    generator = torch.Generator().manual_seed(settings.seed)
    return subject.random_images(settings.images, generator, option="--images")


def table(result: dict[str, Any]) -> Table:
    """The result for the terminal."""
    made = Table(
        title=f"Maps of {len(result['keys'])} images: {result['picture']}, {result['attention_picture']}",
        caption=f"three components hold {result['explained']:.0%} of the variance of the teacher's patch features",
        box=SIMPLE_HEAD,
    )
    made.add_column("head of the last block")
    made.add_column("entropy of its attention, share of the largest", justify="right")
    for head, value in enumerate(result["entropy"], start=1):
        made.add_row(str(head), f"{value:.2f}")
    return made

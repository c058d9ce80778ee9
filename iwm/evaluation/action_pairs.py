"""Pairs of a source and a target view whose action is to be inferred, with the true action.

There are two kinds of pairs:

- `clean`: the source is the clean image, the target has the jitter of the run's targets, at probability 1;
- `destructive`: both views are sampled from the run's settings with jitter at probability 1. Each destructive op is
  applied to half of an image's pairs, so that chance is 1/2 for every image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dali_pipelines.augmentations import DESTRUCTIVE_OPS, IDENTITY, JITTER_OPS, NO_PHOTOMETRIC, OPS, PhotometricConfig
from dali_pipelines.replay import apply_photometric, sample_photometric
from dali_pipelines.views import Views
from iwm.action_space import ActionSpace
from iwm.actions import ActionSpec, action_between

PairKind = Literal["clean", "destructive"]


@dataclass(frozen=True)
class ActionPairs:
    """Pairs of views of the same image, in the order of the images."""

    sources: UInt8[Tensor, "s h w 3"]
    source_of: Int64[Tensor, " b"]
    """Source of each pair; pairs of `clean` share their image's."""
    targets: UInt8[Tensor, "b h w 3"]
    image_of: Int64[Tensor, " b"]
    """Image of each pair, from 0."""
    source_params: Float[Tensor, "b p"]
    target_params: Float[Tensor, "b p"]
    actions: Float[Tensor, "b k"]
    """True actions."""


def pair_kinds(views: Views) -> tuple[PairKind, ...]:
    """Return the kinds of pairs whose action this run's predictor could know."""
    clean = any(views.target.applies(op) for op in JITTER_OPS)
    destructive = views.source.destructive
    return (*(("clean",) if clean else ()), *(("destructive",) if destructive else ()))


def sample_pairs(
    images: UInt8[Tensor, "b h w 3"],
    kind: PairKind,
    views: Views,
    spec: ActionSpec,
    count: int,
    generator: torch.Generator,
) -> ActionPairs:
    """Sample `count` pairs of every image. The views of one image do not depend on how many images follow."""
    source_view, target_view = _sampled_views(kind, views)
    drawn = [(_draw(source_view, count, generator), _draw(target_view, count, generator)) for _ in range(len(images))]
    source, target = (torch.cat(params).to(images.device) for params in zip(*drawn, strict=True))
    image_of = torch.arange(len(images), device=images.device).repeat_interleave(count)
    repeated = images[image_of]
    clean = kind == "clean"
    return ActionPairs(
        sources=images if clean else apply_photometric(repeated, source, views.jitter_impl),
        source_of=image_of if clean else torch.arange(len(image_of), device=images.device),
        targets=apply_photometric(repeated, target, views.jitter_impl),
        image_of=image_of,
        source_params=source,
        target_params=target,
        actions=action_between(source, target, spec),
    )


def blind_guess(kind: PairKind, views: Views, spec: ActionSpec, space: ActionSpace) -> Float[Tensor, "k"]:
    """Return the best answer without looking: the middle of what is sampled, and 1/2 for flags."""
    middle = [torch.tensor([_middle(view)]) for view in _sampled_views(kind, views)]
    guess = action_between(middle[0], middle[1], spec)[0]
    guess[list(space.flags)] = 0.5
    return guess


def _sampled_views(kind: PairKind, views: Views) -> tuple[PhotometricConfig, PhotometricConfig]:
    target = _certain(views.target)
    return (NO_PHOTOMETRIC, target.without_destructive()) if kind == "clean" else (_certain(views.source), target)


def _certain(view: PhotometricConfig) -> PhotometricConfig:
    """Return the settings with probability 1 for the jitter and for each destructive op that they have."""
    names = ("jitter", *(op.name for op in DESTRUCTIVE_OPS))
    return view.with_fields({f"{name}_probability": float(getattr(view, f"{name}_probability") > 0) for name in names})


def _draw(view: PhotometricConfig, count: int, generator: torch.Generator) -> Float[Tensor, "n p"]:
    """Sample params; each destructive op is left out of half of them, chosen at random."""
    params = sample_photometric(view, count, generator)
    for column, op in enumerate(OPS):
        if op in DESTRUCTIVE_OPS:
            order = torch.randperm(count, generator=generator)
            more = int(torch.randint(2, (), generator=generator)) if count % 2 else 0
            params[order[: count // 2 + more], column] = op.identity
    return params


def _middle(view: PhotometricConfig) -> tuple[float, ...]:
    changed = {op: sum(view.value_range(op)) / 2 for op in JITTER_OPS if view.probability(op) > 0}
    return tuple(changed.get(op, identity) for op, identity in zip(OPS, IDENTITY, strict=True))

"""Figure of inferred actions: source, target, and the view that the inferred action leads to."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, UInt8
from torch import Tensor

from dali_pipelines.augmentations import JitterImpl
from dali_pipelines.replay import apply_photometric
from iwm.action_space import ActionSpace
from iwm.actions import ActionSpec, describe_action
from iwm.evaluation.action_pairs import ActionPairs, PairKind
from iwm.evaluation.action_tables import TITLES
from iwm.evaluation.figures import FigureTile, TileBlock, TileColumn, TileFigure, TileGroup

CAPTION = (
    "The source, the target, and the view that the inferred action leads to: the clean image with the source's own "
    "parameters, changed by the action. It equals the target where the action is the true one. One pair of each image."
)


def figure(
    kinds: Sequence[tuple[PairKind, ActionPairs, Float[Tensor, "b k"]]],
    images: UInt8[Tensor, "n h w 3"],
    keys: Sequence[str],
    most: int,
    space: ActionSpace,
    spec: ActionSpec,
    jitter_impl: JitterImpl,
) -> TileFigure:
    """Return the figure of the first pair of the first `most` images; `kinds`: pairs of each kind and their answers."""
    groups = []
    for kind, pairs, answers in kinds:
        shown_images = pairs.image_of.tolist()
        first = [shown_images.index(image) for image in dict.fromkeys(shown_images)][:most]
        chosen = answers[first].to(pairs.source_params.device)
        replayed = apply_photometric(
            images[pairs.image_of[first]], space.applied(pairs.source_params[first], chosen), jitter_impl
        )
        blocks = []
        for shown, i in enumerate(first):
            words = [describe_action(action, spec) for action in (pairs.actions[i], chosen[shown])]
            key = keys[int(pairs.image_of[i])]
            views = (pairs.sources[pairs.source_of[i]], pairs.targets[i], replayed[shown])
            blocks.append(_block(f"photograph {key}, {TITLES[kind]}", words, [view.cpu() for view in views]))
        groups.append(TileGroup(TITLES[kind].capitalize(), blocks))
    return TileFigure("Inferred actions", CAPTION, groups, tile_width=72)


def _block(subject: str, words: Sequence[str], views: Sequence[UInt8[Tensor, "h w 3"]]) -> TileBlock:
    alts = ("source", f"target, true action: {words[0]}", f"source with the inferred action: {words[1]}")
    columns = [
        TileColumn(title, (FigureTile(view, f"{subject}: {alt}"),))
        for title, alt, view in zip(("source", "target", "inferred"), alts, views, strict=True)
    ]
    return TileBlock("", columns, notes=(f"true: {words[0]}", f"inferred: {words[1]}"))

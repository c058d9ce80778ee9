"""Inferred actions: which action leads from this source to that target, found by search through the predictor.

The search makes the distance between the prediction from the source under an action and the target encoder's features
of the target small, as planners do in the latent space of a world model. Searches from both encoders' features of the
source are compared with the true action on two kinds of pairs (action_pairs.py). On the same pairs:

- `guess`: the middle of what is sampled, the best answer without looking;
- `regressor`: what the encoder alone knows (action_regressor.py);
- `lattice`: the nearest of a fixed number of actions, from which the search by gradient starts;
- `control`: the search through the predictor of a run whose actions were shuffled in training.

A search whose answer is nearer than the true action has succeeded, and an error is the model's; where the true action
is nearer, the search has failed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from iwm.action_space import ActionSpace, action_space
from iwm.compat import synchronize
from iwm.config import ConfigError
from iwm.encoder_outputs import ENCODERS, EncoderName
from iwm.evaluation.action_figure import figure
from iwm.evaluation.action_pairs import ActionPairs, blind_guess, pair_kinds, sample_pairs
from iwm.evaluation.action_regressor import pair_features, train_regressor
from iwm.evaluation.action_scores import per_image, score_actions, scored_entries
from iwm.evaluation.action_settings import InferActionSettings
from iwm.evaluation.action_tables import tables
from iwm.evaluation.common import EvalContext, first_images, mean_and_stderr
from iwm.evaluation.figures import write_figures
from iwm.evaluation.held_out import HELD_OUT_REMEDY, MissingDataError, require_images, require_splits
from iwm.models.action_energy import ActionEnergy
from iwm.models.action_search import FoundActions, search_by_gradient
from iwm.models.cross_entropy import search_by_cem
from iwm.models.world_model import WorldModel
from iwm.training.checkpoint import load_world_model
from shards.format import list_splits

__all__ = ["evaluate", "tables"]

DIGITS = 4
"""Decimals of the stored answers."""


def evaluate(context: EvalContext, settings: InferActionSettings, output: Path) -> dict[str, Any]:
    """Infer the actions of all pairs in every way, and score them.

    Raises MissingDataError for a run without conditioning or whose views never differ, and for fewer than two images;
    ConfigError for invalid settings and an unsuitable control.
    """
    space = _space(context)
    _check(settings)
    control = None if settings.control is None else _load_control(context, settings.control)
    images, keys = context.first_images(settings.num_images, at_least=2)
    left_out: dict[str, str] = {}
    training = _training_images(context, settings, left_out)
    model, views = context.model, context.config.views
    kinds, shown = {}, []
    for number, kind in enumerate(pair_kinds(views)):
        generator = torch.Generator().manual_seed(settings.seed + number)
        pairs = sample_pairs(images, kind, views, model.action_spec, settings.num_targets, generator)
        answers = {"guess": blind_guess(kind, views, model.action_spec, space).expand(len(pairs.actions), -1)}
        if training is not None:
            regressor = train_regressor(
                model, training, kind, space, settings.regressor, settings.batch_size, settings.seed
            )
            answers["regressor"] = regressor.answer(pair_features(model, pairs, settings.batch_size))
        searches: dict[str, Any] = {}
        for name, found, record in track(
            _searches(model, control, pairs, space, settings), f"searches, {kind}", transient=True
        ):
            answers[name], searches[name] = found, record
        kinds[kind] = {
            "pairs": len(pairs.actions),
            "methods": {
                name: score_actions(found, pairs.actions, pairs.image_of, space) for name, found in answers.items()
            },
            "searches": searches,
            "values": _values(pairs, answers, keys, space),
        }
        shown.append((kind, pairs, answers[settings.search[0]]))
    colour = views.jitter_impl
    figures = [figure(shown, images, keys, settings.num_shown, space, model.action_spec, colour)]
    return {
        "images": len(images),
        "distance": settings.distance,
        "search": list(settings.search),
        "control": None if settings.control is None else str(settings.control),
        "kinds": kinds,
        "left_out": left_out,
        **write_figures(figures if settings.num_shown else [], output),
    }


def _space(context: EvalContext) -> ActionSpace:
    try:
        space = action_space(context.config, context.model.action_spec)
    except ConfigError as error:
        raise MissingDataError(str(error)) from error
    if not pair_kinds(context.config.views):
        raise MissingDataError(
            "the run's target views have no jitter and its source views no destructive augmentation, so there is no "
            "action to infer; use a run with either"
        )
    return space


def _check(settings: InferActionSettings) -> None:
    if not settings.search or len(set(settings.search)) < len(settings.search):
        raise ConfigError(f"--search {' '.join(settings.search)}: name gradient, cem, or both, each once")
    settings.cem.check()
    if not settings.regressor.penalties:
        raise ConfigError("--regressor.penalties: name at least one")


def _load_control(context: EvalContext, path: Path) -> WorldModel:
    """Return the model of a run that was trained with shuffled actions. Raises ConfigError for another run."""
    model, config = load_world_model(path, context.device)
    if not config.action.shuffle:
        raise ConfigError(f"--control {path} was not trained with --action.shuffle; train one, or omit --control")
    if config.views != context.config.views or model.action_spec != context.model.action_spec:
        raise ConfigError(
            f"--control {path} was trained with other views or another encoding of actions; use a control with the "
            "run's own --views and --action.jitter-encoding"
        )
    return model


def _training_images(context: EvalContext, settings: InferActionSettings, left_out: dict[str, str]) -> Tensor | None:
    """Return images of the regressor's split; None, with the reason in `left_out`, where the data have no such split.

    Raises ConfigError for a split that the settings name and the data lack.
    """
    given, shards, held_out = settings.regressor.split, context.data.shards, context.data.split
    split, most = given or context.config.data.train, settings.regressor.num_images
    try:
        require_splits(shards, split, held_out, "--regressor.split")
        if split == held_out:
            raise MissingDataError(
                f"it would be trained and evaluated on the same images, split '{split}'; use --regressor.split NAME, "
                f"{HELD_OUT_REMEDY}"
            )
        images, _ = first_images(shards, split, size=context.config.views.size, most=most, device=context.device)
        require_images(len(images), 10, shards, split)
    except MissingDataError as error:
        if given is not None and given not in list_splits(shards):
            raise ConfigError(str(error)) from error
        left_out["regressor"] = str(error)
        return None
    context.note_fewer(len(images), most, split, "training images of the regressor")
    return images


def _searches(
    model: WorldModel,
    control: WorldModel | None,
    pairs: ActionPairs,
    space: ActionSpace,
    settings: InferActionSettings,
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Yield name, answers and record of every search: from both encoders, then through the control's predictor."""
    for encoder in ENCODERS:
        energy = pair_energy(model, pairs, encoder, settings)
        true = _true_distances(energy, pairs)
        for name in settings.search:
            for method, found, record in _search(name, energy, true, pairs, space, settings):
                yield (method if encoder == "teacher" else f"{method}, {encoder}"), found.actions, record
    if control is not None:
        energy = pair_energy(control, pairs, "teacher", settings)
        true = _true_distances(energy, pairs)
        *_, (_, found, record) = _search(settings.search[0], energy, true, pairs, space, settings)
        yield "control", found.actions, record


@torch.no_grad()
def pair_energy(
    model: WorldModel, pairs: ActionPairs, encoder: EncoderName, settings: InferActionSettings
) -> ActionEnergy:
    """Embed the views of all pairs and return the distances that a search makes small."""
    size = settings.batch_size
    return ActionEnergy(
        predict=model.predict,
        contexts=torch.cat([model.encode(part, encoder) for part in pairs.sources.split(size)]),
        source_of=pairs.source_of,
        targets=torch.cat([model.target_features(part) for part in pairs.targets.split(size)]),
        pooled=settings.distance == "pooled",
        batch_size=size,
    )


def _true_distances(energy: ActionEnergy, pairs: ActionPairs) -> Float[Tensor, " b"]:
    return energy.distances(torch.arange(len(energy), device=energy.device), pairs.actions)


def _search(
    name: str,
    energy: ActionEnergy,
    true: Float[Tensor, " b"],
    pairs: ActionPairs,
    space: ActionSpace,
    settings: InferActionSettings,
) -> Iterator[tuple[str, FoundActions, dict[str, Any]]]:
    """Yield name, answers and record of one search; that by gradient begins with its lattice.

    true: distances of the true actions.
    """
    b = len(energy)
    energy.predictions = 0
    start = time.perf_counter()
    if name == "gradient":
        coarse, found = search_by_gradient(energy, space, settings.gradient)
    else:
        coarse, found = None, search_by_cem(energy, space, settings.cem, settings.seed)
    synchronize(energy.device)
    milliseconds = 1000 * (time.perf_counter() - start) / b
    if coarse is not None:
        yield "lattice", coarse, _record(coarse, true, pairs)
    cost = {"predictions": energy.predictions / b, "milliseconds": milliseconds}
    yield name, found, _record(found, true, pairs) | cost


def _record(found: FoundActions, true: Float[Tensor, " b"], pairs: ActionPairs) -> dict[str, Any]:
    images = pairs.image_of.cpu()
    means = {"found": found.distances, "true": true, "nearer": (found.distances < true).double()}
    return {name: mean_and_stderr(per_image(values.cpu(), images)) for name, values in means.items()}


def _values(pairs: ActionPairs, answers: Mapping[str, Tensor], keys: list[str], space: ActionSpace) -> dict[str, Any]:
    """Return image, true value and answers of every pair, rounded; parameters in their units."""
    everything = {"true": pairs.actions, **answers}
    values: dict[str, Any] = {"image": [keys[i] for i in pairs.image_of.tolist()], "entries": {}}
    for i in (*scored_entries(pairs.actions, space.jitter), *scored_entries(pairs.actions, space.flags)):
        entry = space.entries[i]
        values["entries"][entry.name] = {
            name: [round(value, DIGITS) for value in _shown(actions[:, i].double(), entry.is_flag, space, i).tolist()]
            for name, actions in everything.items()
        }
    return values


def _shown(values: Tensor, is_flag: bool, space: ActionSpace, i: int) -> Tensor:
    return values if is_flag else space.entries[i].change(values)

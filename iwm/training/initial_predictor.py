"""Initialisation of the predictor from a known one: its blocks, and its conditioning where the actions agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from iwm.actions import ActionSpec, action_spec
from iwm.config import Config
from iwm.models.external.tensors import abbreviated, depth_of, mismatches, mlp_ratio_of
from iwm.models.predictor import CONDITIONING, Conditioning
from iwm.models.world_model import WorldModel
from iwm.training.weight_sources import SourcePredictor


def shape_options(section: str, values: Mapping[str, int | None], ratio: float, config: Config) -> list[str]:
    """Return the options that give the section `encoder` or `predictor` these values (None: not known).

    ratio: ratio of the MLP's hidden width to embed_dim, compared by the hidden widths.
    """
    settings, width = getattr(config, section), values["embed_dim"]
    found: dict[str, Any] = {
        name: value for name, value in values.items() if value is not None and value != getattr(settings, name)
    }
    if width is not None and int(width * settings.mlp_ratio) != int(width * ratio):
        found["mlp_ratio"] = ratio
    return [f"--{section}.{name.replace('_', '-')} {value}" for name, value in found.items()]


def predictor_options(predictor: SourcePredictor | None, config: Config) -> list[str]:
    """Return the options that make the run's predictor this one, as far as its tensors show its shape."""
    tensors = predictor.tensors if predictor else {}
    width, hidden = (tensors.get(name) for name in ("mask_token", "blocks.0.mlp.fc1.bias"))
    if predictor is None or width is None or hidden is None:
        return []
    heads = predictor.num_heads or config.encoder.num_heads
    values = {"embed_dim": len(width), "depth": depth_of(tensors, "blocks"), "num_heads": heads}
    return shape_options("predictor", values, mlp_ratio_of(len(hidden), len(width)), config)


def load_predictor(source: SourcePredictor, config: Config | None, model: WorldModel) -> tuple[set[str], list[str]]:
    """Load the tensors that fit the model's predictor. Return their names, and why others do not fit.

    config: configuration of the source's run; None for I-JEPA's predictor, which has no conditioning. A predictor of
    another shape is not loaded at all. The conditioning is loaded where it is of the same kind and its actions have the
    same entries. Where these are divided by other strengths of the jitter, its weights are rescaled: an action then
    means the same change.
    """
    predictor = model.predictor
    core, ours = _without_conditioning(source.tensors), _without_conditioning(predictor.state_dict())
    options, problems = predictor_options(source, model.config), mismatches(ours, core)
    if options or problems:
        reason = f"it would fit with {' '.join(options)}" if options else abbreviated(problems)
        return set(), [f"predictor not loaded: {reason}"]
    predictor.load_state_dict(core, strict=False)
    conditioning, module = predictor.conditioning, predictor.conditioning.module_name
    tensors = {
        name.removeprefix(f"{module}."): tensor
        for name, tensor in source.tensors.items()
        if name.startswith(f"{module}.")
    }
    if not tensors or config is None:
        return set(core), []
    spec = action_spec(config.action, config.views)
    reason = _unfit(conditioning, tensors, spec, model.action_spec)
    if reason:
        return set(core), [f"predictor.{module} not loaded: {reason}"]
    names = {*core, *(f"{module}.{name}" for name in tensors)}
    conditioning.load_state_dict(tensors, strict=True)
    if spec.scale == model.action_spec.scale:
        return names, []
    _rescale(conditioning, spec, model.action_spec)
    strengths = (", ".join(f"{scale:g}" for scale in each.scale) for each in (spec, model.action_spec))
    return names, [f"predictor.{module} rescaled from jitter strengths {' to '.join(strengths)}"]


def _without_conditioning(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kinds = tuple(f"{kind.module_name}." for kind in CONDITIONING.values())
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(kinds)}


def _unfit(conditioning: Conditioning, tensors: Mapping[str, torch.Tensor], old: ActionSpec, new: ActionSpec) -> str:
    """Return the reason why a conditioning of the same kind cannot be loaded; '' where it can."""
    if old.jitter_encoding != new.jitter_encoding:
        return f"its actions encode the jitter as {old.jitter_encoding}, this run's as {new.jitter_encoding}"
    if old.names != new.names:
        different = sorted(set(old.names) ^ set(new.names))
        return f"its actions and this run's differ in {', '.join(different)}"
    if old.scale != new.scale and conditioning.action_weights() is None:
        return "the strengths of the jitter differ, and its action_weights are not known"
    return abbreviated(mismatches(conditioning.state_dict(), tensors))


@torch.no_grad()
def _rescale(conditioning: Conditioning, old: ActionSpec, new: ActionSpec) -> None:
    """Rescale the weights of the action, whose entries are now divided by another scale."""
    weights = conditioning.action_weights()
    assert weights is not None  # checked by _unfit
    factors = torch.ones(new.size)
    factors[: len(new.scale)] = torch.tensor(new.scale) / torch.tensor(old.scale)
    weights.mul_(factors.to(weights.device))

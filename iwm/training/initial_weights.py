"""Initialisation of a run from known weights (`init_from`): checks, loading, and an account of every tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from iwm.config import Config, ConfigError
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from iwm.models.external.conversion import ConvertedEncoder, convert_encoder, with_imagenet_pixels
from iwm.models.layers import resample_positions
from iwm.models.world_model import WorldModel
from iwm.training.initial_predictor import load_predictor, predictor_options, shape_options
from iwm.training.weight_sources import SourceEncoder, WeightSource, read_source
from shards.errors import UserError


@dataclass(frozen=True)
class InitialWeights:
    """Weights that fit a run's encoders, and perhaps its predictor."""

    source: WeightSource
    student: ConvertedEncoder
    teacher: ConvertedEncoder
    """Positions of both are those of the run's grid."""


def read_initial_weights(path: Path, config: Config) -> InitialWeights:
    """Read the weights, on the CPU, and check them against the configuration.

    Raises ConfigError where the file is not known, or its encoder is another one than the configured; the message then
    names the options to set.
    """
    try:
        source = read_source(path)
        student, teacher = (_fit(encoder, source, config) for encoder in (source.student, source.teacher))
    except UserError as error:
        raise ConfigError(f"--init-from: {error}") from error
    return InitialWeights(source, student, teacher)


def _fit(encoder: SourceEncoder, source: WeightSource, config: Config) -> ConvertedEncoder:
    found = convert_encoder(encoder.state, source.path)
    options = _encoder_options(found, source.num_heads, config)
    if options:
        predictor = " ".join(predictor_options(source.predictor, config))
        raise ConfigError(
            f"{source.path}: its encoder has depth {found.depth}, width {found.embed_dim}, "
            f"{source.num_heads or 'an unknown number of'} heads and patches of {found.patch_size} px; use "
            f"{' '.join(options)}{predictor and f', and for its predictor {predictor}'}"
        )
    tensors = found.tensors
    if _has_other_pixels(source):
        tensors = with_imagenet_pixels(tensors, *source.pixels)
    old, new = (found.grid, found.grid), (config.grid_size, config.grid_size)
    return replace(found, tensors={**tensors, "pos_embed": resample_positions(tensors["pos_embed"], old, new)})


def _encoder_options(found: ConvertedEncoder, heads: int | None, config: Config) -> list[str]:
    """Return the options that make the run's encoder the found one."""
    values = {"embed_dim": found.embed_dim, "depth": found.depth, "num_heads": heads, "patch_size": found.patch_size}
    options = shape_options("encoder", values, found.mlp_ratio, config)
    size = config.views.size
    if size % found.patch_size or size // found.patch_size < 3:
        options.append(f"--views.size {found.grid * found.patch_size}")
    return options


def load_initial_weights(initial: InitialWeights, model: WorldModel) -> list[str]:
    """Load the weights into both encoders and, as far as they fit, the predictor. Return the lines for the user.

    Call it before the model is wrapped or sharded. The lines name everything in the file that is not used, and every
    part of the model that keeps its random initialisation.
    """
    source, config = initial.source, model.config
    loaded, used = set[str](), set[str]()
    for name, part, encoder, found in (
        ("encoder", model.encoder, source.student, initial.student),
        ("target_encoder", model.target_encoder, source.teacher, initial.teacher),
    ):
        part.load_state_dict(found.tensors, strict=True)
        loaded |= {f"{name}.{tensor}" for tensor in found.tensors}
        used |= {encoder.prefix + tensor for tensor in found.tensors}
    names, reasons = set[str](), list[str]()
    if source.predictor is not None:
        names, reasons = load_predictor(source.predictor, source.config, model)
        loaded |= {f"predictor.{name}" for name in names}
        used |= {source.predictor.names[name] for name in names}
    unused = grouped(source.names, used)
    others = ("class token", "distillation token")[: initial.student.other_positions]
    unused += [f"pos_embed of the {' and the '.join(others)}"] if others else []
    encoders = ((initial.student, source.student), (initial.teacher, source.teacher))
    student, teacher = (f"{len(found.tensors)}{_from(encoder)}" for found, encoder in encoders)
    return [
        f"initial weights: {source.path} ({source.kind})",
        f"  tensors: context encoder {student}, target encoder {teacher}, predictor {len(names)}",
        *(f"  {line}" for line in (*_changes(initial, bool(names), config), *source.notes, *reasons)),
        f"  not used: {', '.join(unused) or 'nothing'}",
        f"  newly initialised: {', '.join(grouped(model.state_dict(), loaded)) or 'nothing'}",
    ]


def _from(encoder: SourceEncoder) -> str:
    return f" from {encoder.prefix.removesuffix('.')}" if encoder.prefix else ""


def _has_other_pixels(source: WeightSource) -> bool:
    return tuple(map(tuple, source.pixels)) != (IMAGENET_MEAN, IMAGENET_STD)


def _changes(initial: InitialWeights, predictor: bool, config: Config) -> list[str]:
    """Return a line for each change that the loaded tensors needed."""
    lines = []
    if _has_other_pixels(initial.source):
        mean, std = (", ".join(f"{value:g}" for value in values) for values in initial.source.pixels)
        lines.append(
            f"trained on pixels with mean {mean} and standard deviation {std}; patch_embed.proj was changed, so that "
            "with ImageNet's mean and standard deviation it computes the same"
        )
    old, new = initial.student.grid, config.grid_size
    if old != new:
        fixed = f"; those of the predictor are the sine-cosine of {new}×{new}" if predictor else ""
        lines.append(f"positions interpolated from {old}×{old} to {new}×{new}{fixed}")
    return lines


def grouped(names: Collection[str], others: Collection[str]) -> list[str]:
    """Return the names that are not in `others`; those of a module with none of `others` as one, with their number."""
    shared = {module for name in others for module in _modules(name)}
    groups = defaultdict[str, list[str]](list)
    for name in names:
        if name not in others:
            groups[next((module for module in _modules(name) if module not in shared), name)].append(name)
    return [f"{group} ({len(part)} tensors)" if len(part) > 1 else part[0] for group, part in groups.items()]


def _modules(name: str) -> list[str]:
    """Return the modules of a tensor, from the outermost, and the tensor itself."""
    return list(accumulate(name.split("."), "{}.{}".format))

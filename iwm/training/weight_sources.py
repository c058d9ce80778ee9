"""Known weights to start from (`init_from`): which file a path means, and the networks in it.

The format is recognised from the content. This project's runs, checkpoints and exported folders are read by the same
functions as everywhere else, other projects' files by iwm/models/external.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from iwm.config import Config, ConfigError
from iwm.config_io import from_dict
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from iwm.models.external.formats import Layout, State, below, entries, find_layouts, flatten, has_vit, read_file
from iwm.models.external.ijepa_predictor import POSITIONS, convert_predictor, has_sincos_positions, our_names
from iwm.models.external.loading import HEADS
from iwm.models.external.tensors import shape_of
from iwm.models.external.timm_folder import TimmArchitecture, find_weights, read_architecture
from iwm.training import export_files
from iwm.training.checkpoint import list_checkpoints, load_checkpoint, resolve

ACCEPTED = (
    "a run's folder, one of its checkpoints, a folder of `iwm export`, a file or folder of a timm ViT, or a file of "
    "I-JEPA, MAE, DINO, iBOT or MoCo v3"
)


@dataclass(frozen=True)
class SourceEncoder:
    """An encoder of a source, by timm's names."""

    prefix: str
    """Beginning of its names in the source."""
    state: State


@dataclass(frozen=True)
class SourcePredictor:
    """A predictor of a source, by this project's names."""

    names: dict[str, str]
    """Names in the source by this project's names."""
    tensors: State
    num_heads: int | None
    """None: the source does not state it."""


@dataclass(frozen=True)
class WeightSource:
    """Networks of a file or folder."""

    path: Path
    kind: str
    """Format, in words."""
    names: tuple[str, ...]
    """Names of all tensors and other entries."""
    student: SourceEncoder
    teacher: SourceEncoder
    """The same as `student` where the source has one encoder."""
    predictor: SourcePredictor | None
    num_heads: int | None
    """Number of heads of the encoders. None: the source does not state it."""
    config: Config | None = None
    """Configuration of a run of this project."""
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = (IMAGENET_MEAN, IMAGENET_STD)
    """Mean and standard deviation of each channel of the training's pixels in [0, 1]."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""


def read_source(path: Path) -> WeightSource:
    """Read the networks of a run, a checkpoint, an exported folder, or a published file, on the CPU.

    Raises UserError where there are none; the message names what was found and what is accepted.
    """
    if path.is_dir():
        if list_checkpoints(path):
            return _read_checkpoint(path)
        if export_files.is_export_dir(path):
            return _read_export(path)
        weights = find_weights(path)
        if weights is None:
            found = entries(dict.fromkeys(sorted(file.name for file in path.iterdir())))
            raise ConfigError(f"{path} holds no known weights but {found}; give {ACCEPTED}")
        return _read_external(weights)
    if path.suffix == ".safetensors" and export_files.is_export_dir(path.parent):
        raise ConfigError(f"{path} is one file of an exported model; give its folder, {path.parent}")
    return _read_external(path)


def _read_checkpoint(path: Path) -> WeightSource:
    """Read a run's newest checkpoint or a checkpoint file."""
    file = resolve(path)
    checkpoint = load_checkpoint(path)
    content = {name: value for name, value in vars(checkpoint).items() if name != "config"}
    prefixes = ("model.encoder.", "model.target_encoder.", "model.predictor.")
    return _own(file, f"checkpoint of step {checkpoint.step:,}", content, checkpoint.config, prefixes)


def _read_export(folder: Path) -> WeightSource:
    parts = {"encoder": export_files.ENCODER, "predictor": export_files.PREDICTOR, "head": export_files.HEAD}
    try:
        description = export_files.read_description(folder)
        config, encoder = from_dict(description["config"]), str(description["encoder"])
        content = {
            part: export_files.read_tensors(folder / name)
            for part, name in parts.items()
            if part == "encoder" or (folder / name).exists()
        }
    except OSError as error:
        raise export_files.incomplete(folder, error) from error
    except (KeyError, ConfigError) as error:
        raise export_files.damaged(folder / export_files.DESCRIPTION, error) from error
    return _own(folder, f"exported {encoder}", content, config, ("encoder.", "encoder.", "predictor."))


def _own(
    path: Path, kind: str, content: Mapping[str, object], config: Config, prefixes: tuple[str, str, str]
) -> WeightSource:
    """Return the networks of a model of this project. prefixes: of the names of student, teacher and predictor."""
    flat = flatten(content)
    student, teacher, predictor = (below(prefix, flat) for prefix in prefixes)
    names = {name: prefixes[2] + name for name in predictor}
    return WeightSource(
        path=path,
        kind=kind,
        names=tuple(flat),
        student=SourceEncoder(prefixes[0], student),
        teacher=SourceEncoder(prefixes[1], teacher),
        predictor=SourcePredictor(names, predictor, config.predictor.num_heads) if predictor else None,
        num_heads=config.encoder.num_heads,
        config=config,
    )


def _read_external(path: Path) -> WeightSource:
    content = read_file(path)
    if "format" in content:
        return _read_checkpoint(path)
    layouts = find_layouts(content)
    if len(layouts) > 1 and {layout.encoder for layout in layouts.values()} == {""}:
        layouts = {"timm": Layout("")}  # a file with a ViT alone is the same in all formats
    if len(layouts) != 1:
        like = f"looks like {' and '.join(layouts)}" if layouts else "is of no known format"
        raise ConfigError(f"{path} {like}; it holds {entries(content)}; give {ACCEPTED}")
    ((format_name, layout),) = layouts.items()
    flat = flatten(content)
    encoder = SourceEncoder(layout.encoder, below(layout.encoder, flat))
    student, teacher = (
        SourceEncoder(prefix, below(prefix, flat)) if prefix and has_vit(flat, prefix) else encoder
        for prefix in (layout.student, layout.teacher)
    )
    plain = layout.encoder == ""
    architecture = read_architecture(path) if plain else None
    width, *_ = shape_of(encoder.state, "patch_embed.proj.weight", 4, path)
    heads = architecture.num_heads if architecture else HEADS["timm" if plain else format_name].get(width)
    predictor, notes = _ijepa_predictor(layout, flat, heads, path) if layout.predictor else (None, [])
    heads_used = f"{heads} heads" if heads else f"this run's number of heads (no ViT of width {width} was published)"
    if plain and architecture is None:
        notes.append(
            f"not in the file, so assumed: {heads_used}, GELU, norms with ε 1e-6, pixels normalised with ImageNet's "
            "mean and standard deviation"
        )
    elif heads is None:
        notes.append(f"not in the file, so assumed: {heads_used}")
    return WeightSource(
        path=path,
        kind=_kind(format_name, plain, architecture),
        names=tuple(flat),
        student=student,
        teacher=teacher,
        predictor=predictor,
        num_heads=heads,
        pixels=(architecture.mean, architecture.std) if architecture else (IMAGENET_MEAN, IMAGENET_STD),
        notes=tuple(notes),
    )


def _kind(format_name: str, plain: bool, architecture: TimmArchitecture | None) -> str:
    if architecture is not None:
        return f"timm's {architecture.name}"
    return "a ViT by timm's names, such as DINO's and timm's" if plain else f"format {format_name}"


def _ijepa_predictor(
    layout: Layout, flat: dict[str, object], heads: int | None, path: Path
) -> tuple[SourcePredictor | None, list[str]]:
    """Return I-JEPA's predictor, which has as many heads as its encoder; None, with the reason, if it does not fit."""
    state = below(layout.predictor, flat)
    if not state:
        return None, []
    if not has_sincos_positions(state, path):
        return None, [f"predictor not loaded: {POSITIONS} is not the sine-cosine that this project computes"]
    names = {ours: layout.predictor + theirs for ours, theirs in our_names(state).items()}
    return SourcePredictor(names, convert_predictor(state), heads), []

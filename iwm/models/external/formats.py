"""Checkpoint formats of other projects: location of the networks, and recognition of a file's format.

| format | published as | the encoder |
| --- | --- | --- |
| mae | mae_pretrain_vit_*.pth, mae_visualize_vit_*.pth (with the decoder) | under `model` |
| ijepa | IN1K-vit.h.14-300e.pth.tar, with the predictor | under `target_encoder`, each name after `module.` |
| moco_v3 | vit-b-300ep.pth.tar | under `state_dict`, each name after `module.base_encoder.` |
| dino | dino_vitbase16_pretrain.pth | the file itself; of a full checkpoint, the teacher's backbone |
| ibot | checkpoint_teacher.pth | under `state_dict`, or the file itself; of a full checkpoint, the teacher's backbone |

All of them name a ViT's parameters as timm does. Files of I-JEPA and MoCo v3 and full checkpoints hold two encoders:
the trained one (student) and its moving average (teacher).
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shards.errors import UserError, one_line

State = dict[str, Tensor]


class ExternalCheckpointError(UserError):
    """A file or image that an external encoder cannot use; the message names it and the remedy."""


class NoPredictorError(ExternalCheckpointError):
    """A predictor or decoder is requested from a file that holds the encoder alone."""


def read_file(path: Path) -> dict[str, Any]:
    """Read a .pth or .safetensors file, on the CPU. Raises ExternalCheckpointError where it cannot be read."""
    if not path.is_file():
        raise ExternalCheckpointError(f"{path} does not exist; correct the path")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Several projects store their command line's options with the weights; nothing else may be unpickled.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        detail = one_line(error)[:300]
        raise ExternalCheckpointError(
            f"{path} is damaged, or holds more than tensors and plain types ({detail})"
        ) from error
    if not isinstance(content, dict):
        raise ExternalCheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
    return content


@dataclass(frozen=True)
class Layout:
    """Networks of a file: the prefixes of their names, where the names of nested tensors are joined (`flatten`)."""

    encoder: str
    """Prefix of the encoder that the project publishes."""
    student: str = ""
    """Prefix of the encoder that is trained. '': the file has one encoder."""
    teacher: str = ""
    """Prefix of the moving average of the student. '': the file has one encoder."""
    predictor: str = ""
    """Prefix of the predictor. '': none."""
    marker: str = ""
    """Entry that a file of this layout has."""
    others: tuple[str, ...] = ()
    """Beginnings of names that are no part of the encoder: training's projection heads and iBOT's mask token."""


_IBOT = ("head.", "module.head.", "masked_embed")


def _full(marker: str, others: tuple[str, ...] = ()) -> tuple[Layout, ...]:
    """Return the layouts of a full checkpoint of DINO or iBOT, whose teacher's names may have the prefix of DDP."""
    student = "student.module.backbone."
    return tuple(
        Layout(teacher, student=student, teacher=teacher, marker=marker, others=others)
        for teacher in ("teacher.module.backbone.", "teacher.backbone.")
    )


_MOCO = "state_dict.module."
_LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "mae": (Layout("model."),),
    "ijepa": (
        Layout(
            "target_encoder.module.",
            student="encoder.module.",
            teacher="target_encoder.module.",
            predictor="predictor.module.",
        ),
    ),
    "moco_v3": (
        Layout(
            f"{_MOCO}base_encoder.",
            student=f"{_MOCO}base_encoder.",
            teacher=f"{_MOCO}momentum_encoder.",
            others=("head.",),
        ),
    ),
    "dino": (*_full("dino_loss"), Layout("")),
    "ibot": (*_full("ibot_loss", _IBOT), Layout("state_dict.", others=_IBOT), Layout("", others=_IBOT)),
}
FORMATS = tuple(_LAYOUTS)


def flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's tensors by name, those in a dictionary as `entry.name`, and its other entries as they are."""
    flat: dict[str, Any] = {}
    for entry, value in content.items():
        if isinstance(value, dict) and any(isinstance(part, Tensor) for part in value.values()):
            flat |= {f"{entry}.{name}": part for name, part in value.items()}
        else:
            flat[str(entry)] = value
    return flat


def below(prefix: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}


def has_vit(flat: Mapping[str, Any], prefix: str) -> bool:
    """Return True where any name with this prefix is a parameter of a ViT's blocks; others may still be missing."""
    return any(name.startswith(f"{prefix}blocks.") for name in flat)


def find_layouts(content: Mapping[str, Any]) -> dict[str, Layout]:
    """Return the formats that a file's content may have, with the location of its networks."""
    flat = flatten(content)
    found = {name: _layout(layouts, content, flat) for name, layouts in _LAYOUTS.items()}
    return {name: layout for name, layout in found.items() if layout is not None}


def _layout(layouts: tuple[Layout, ...], content: Mapping[str, Any], flat: Mapping[str, Any]) -> Layout | None:
    for layout in layouts:
        if (not layout.marker or layout.marker in content) and has_vit(flat, layout.encoder):
            return layout
    return None


def find_encoder(format_name: str, content: dict[str, Any], path: Path) -> State:
    """Return the encoder's tensors by their names in timm's ViT (MAE: with the decoder's under their published names).

    Raises ExternalCheckpointError where the file does not have the published form of `format_name`; the message names
    the format that it looks like.
    """
    layouts = find_layouts(content)
    if format_name not in layouts:
        raise ExternalCheckpointError(
            f"{path} is not a checkpoint in the format {format_name}: {_looks_like(content, layouts)}"
        )
    layout = layouts[format_name]
    state = below(layout.encoder, flatten(content))
    return {name: value for name, value in state.items() if not name.startswith(layout.others)}


def find_predictor(format_name: str, content: dict[str, Any]) -> State:
    """Return the predictor's tensors of a file that `find_encoder` accepts; empty where it has none."""
    layout = find_layouts(content)[format_name]
    return below(layout.predictor, flatten(content)) if layout.predictor else {}


def _looks_like(content: dict[str, Any], layouts: Mapping[str, Layout]) -> str:
    if layouts:
        return f"it looks like {' or '.join(layouts)}"
    if "format" in content and "config" in content:
        return "it is a checkpoint of this program, for iwm.load"
    return f"it looks like none of {', '.join(FORMATS)}; it holds {entries(content)}"


def entries(content: Mapping[str, Any]) -> str:
    """Return the first entries of a file's content, for an error."""
    return ", ".join(map(str, list(content)[:6])) or "nothing"

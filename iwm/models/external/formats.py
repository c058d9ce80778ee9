"""Checkpoint formats of other projects: location of the encoder, and recognition of a file's format.

| format | published as | the encoder |
| --- | --- | --- |
| mae | mae_pretrain_vit_*.pth, mae_visualize_vit_*.pth (with the decoder) | under `model` |
| ijepa | IN1K-vit.h.14-300e.pth.tar | under `target_encoder`, each name after `module.` |
| moco_v3 | vit-b-300ep.pth.tar | under `state_dict`, each name after `module.base_encoder.` |
| dino | dino_vitbase16_pretrain.pth | the file itself; of a full checkpoint, the teacher's backbone |
| ibot | checkpoint_teacher.pth | under `state_dict`; of a full checkpoint, the teacher's backbone |

All of them name a ViT's parameters as timm does.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shards.errors import UserError

State = dict[str, Tensor]


class ExternalCheckpointError(UserError):
    """A file or image that an external encoder cannot use; the message names it and the remedy."""


class NoDecoderError(ExternalCheckpointError):
    """A decoder is requested from a file that holds the encoder alone."""


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
        detail = " ".join(str(error).split())[:300]
        raise ExternalCheckpointError(
            f"{path} is damaged, or holds more than tensors and plain types ({detail})"
        ) from error
    if not isinstance(content, dict):
        raise ExternalCheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
    return content


def find_encoder(format_name: str, content: dict[str, Any], path: Path) -> State:
    """Return the encoder's tensors by their names in timm's ViT (MAE: with the decoder's under their published names).

    Raises ExternalCheckpointError where the file does not have the published form of `format_name`; the message names
    the format that it looks like.
    """
    found = _FORMS[format_name](content)
    if found is None:
        raise ExternalCheckpointError(f"{path} is not a checkpoint in the format {format_name}: {_looks_like(content)}")
    return found


def _looks_like(content: dict[str, Any]) -> str:
    formats = [format_name for format_name, form in _FORMS.items() if form(content) is not None]
    if formats:
        return f"it looks like {' or '.join(formats)}"
    if "format" in content and "config" in content:
        return "it is a checkpoint of this program, for iwm.load"
    return f"it looks like none of {', '.join(_FORMS)}; it holds {', '.join(map(str, list(content)[:6]))}"


def _mae(content: dict[str, Any]) -> State | None:
    return _vit(content.get("model"))


def _ijepa(content: dict[str, Any]) -> State | None:
    return _vit(_below("module.", content.get("target_encoder"))) if "predictor" in content else None


def _moco_v3(content: dict[str, Any]) -> State | None:
    return _without_head(_vit(_below("module.base_encoder.", content.get("state_dict"))))


def _dino(content: dict[str, Any]) -> State | None:
    return _teacher(content) if "dino_loss" in content else _vit(content)


def _ibot(content: dict[str, Any]) -> State | None:
    return _teacher(content) if "ibot_loss" in content else _vit(content.get("state_dict"))


_FORMS: dict[str, Callable[[dict[str, Any]], State | None]] = {
    "mae": _mae,
    "ijepa": _ijepa,
    "moco_v3": _moco_v3,
    "dino": _dino,
    "ibot": _ibot,
}
FORMATS = tuple(_FORMS)


def _teacher(content: dict[str, Any]) -> State | None:
    """Return the backbone of a full checkpoint's teacher, whose names may have the prefix of DDP."""
    teacher = content.get("teacher")
    return _vit(_below("module.backbone.", teacher) or _below("backbone.", teacher))


def _below(prefix: str, state: object) -> State:
    if not isinstance(state, dict):
        return {}
    return {name.removeprefix(prefix): value for name, value in state.items() if str(name).startswith(prefix)}


def _without_head(state: State | None) -> State | None:
    """Drop the projection that training put in place of timm's `head`."""
    return state and {name: value for name, value in state.items() if not name.startswith("head.")}


def _vit(state: object) -> State | None:
    """Return the state if it has any parameter of a ViT's blocks, else None; missing tensors are reported later."""
    return state if isinstance(state, dict) and any(str(name).startswith("blocks.") for name in state) else None

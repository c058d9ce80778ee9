"""The folder of an exported model: weights as safetensors, everything else as JSON. tools/export.py makes them.

| file | holds |
| --- | --- |
| encoder.safetensors | the encoder under the names of timm's VisionTransformer |
| encoder.json | the arguments of that VisionTransformer |
| predictor.safetensors | the world model |
| config.json | the run's configuration, layout of actions, grid of patches, normalisation, origin |
| README.md | the model card |

A folder appears whole or not at all.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from iwm.action_words import layout
from iwm.actions import action_spec
from iwm.config import Config, ConfigError, from_dict, to_dict
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD, timm_arguments
from iwm.training.checkpoint import CheckpointError, versions
from shards.atomic import sync_folder, write_atomically

FORMAT = 1
ENCODER, ENCODER_ARGUMENTS = "encoder.safetensors", "encoder.json"
PREDICTOR, CONFIG, CARD = "predictor.safetensors", "config.json", "README.md"


Which = Literal["target", "context"]
"""The target encoder (the paper's teacher) or the context encoder."""


@dataclass(frozen=True)
class Origin:
    """Where a model comes from."""

    name: str
    """The run's folder and the checkpoint's file, as 'demo/step-000002000.pt'."""
    step: int
    """Optimiser steps taken."""
    samples: int
    """Images trained on."""


@dataclass(frozen=True)
class Exported:
    """What an exported folder holds, but for its card."""

    config: Config
    which: Which
    origin: Origin
    encoder: dict[str, Tensor]
    predictor: dict[str, Tensor]


def is_exported(folder: Path) -> bool:
    """Whether a folder is meant to be an exported model's."""
    return (folder / ENCODER).exists() or (folder / PREDICTOR).exists()


def write_exported(exported: Exported, card: str, out: Path) -> None:
    """Write the folder. One that holds the same weights already has its texts renewed; any other is refused.

    Raises CheckpointError for a folder that is in the way, OSError where it cannot be written.
    """
    files = {
        ENCODER: _packed(exported.encoder),
        ENCODER_ARGUMENTS: _json(timm_arguments(exported.config.encoder, exported.config.views.size)),
        PREDICTOR: _packed(exported.predictor),
        CONFIG: _json(_description(exported)),
        CARD: card.encode(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_name(f".{out.name}.{os.getpid()}.partial")
    made.mkdir()
    try:
        for name, content in files.items():
            write_atomically(made / name, content)
        if out.is_dir() and any(out.iterdir()):
            if filecmp.cmpfiles(made, out, (ENCODER, PREDICTOR), shallow=False)[0] != [ENCODER, PREDICTOR]:
                raise CheckpointError(f"{out} holds something else; name another folder or delete it")
            for name in files:
                os.replace(made / name, out / name)
            sync_folder(out)
        elif out.exists() and not out.is_dir():
            raise CheckpointError(f"{out} is a file; name a folder")
        else:
            os.replace(made, out)
            sync_folder(out.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_exported(folder: Path) -> Exported:
    """Read it back, on the CPU. Raises CheckpointError for what is missing or damaged."""
    path = folder / CONFIG
    try:
        description = json.loads(path.read_bytes())
        if description["format"] != FORMAT:
            raise CheckpointError(f"{path} was written by another version of this program (format is not {FORMAT})")
        return Exported(
            config=from_dict(description["config"]),
            which=description["encoder"],
            origin=Origin(**description["origin"]),
            encoder=_unpacked(folder / ENCODER),
            predictor=_unpacked(folder / PREDICTOR),
        )
    except OSError as error:
        raise CheckpointError(f"{folder} is no whole exported model ({error}); export it again") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); export the model again") from error


def _description(exported: Exported) -> dict[str, object]:
    config = exported.config
    spec = action_spec(config.action, config.views)
    return {
        "format": FORMAT,
        "encoder": exported.which,
        "origin": asdict(exported.origin),
        "patch_grid": [config.grid, config.grid],
        "width": config.encoder.width,
        "pixels": {"size": config.views.size, "from": [0, 1], "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "action": {
            "conditioning": config.action.conditioning,
            "jitter": spec.jitter,
            "entries": layout(config, spec),
        },
        "config": to_dict(config),
        "versions": versions(),
    }


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    content: bytes = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    return content


def _unpacked(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); export the model again") from error
    return tensors


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()

"""Folder of an exported model, written by tools/export.py: weights as safetensors, the rest as JSON.

| file | content |
| --- | --- |
| model.safetensors | the encoder with timm's VisionTransformer parameter names, and a linear head if there is one |
| config.json | that VisionTransformer in timm's form, with its preprocessing (timm_config.py) |
| predictor.safetensors | the predictor; absent where the encoder was finetuned, because it no longer fits |
| head.safetensors | other trained parts: attentive heads, UPerNet, finetuned predictor, task tokens |
| head.json | description of the head: protocol, trial, tasks with their classes by number, data and scores |
| iwm.json | the run's configuration, action layout, patch grid, normalisation, origin |
| encoder.onnx, predictor.pt2, … | graphs for deployment where they were asked for (graphs.py) |
| README.md | the model card |

A folder is written completely or not at all.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from iwm.actions import action_schema, action_spec
from iwm.config import Config, ConfigError
from iwm.config_io import from_dict, to_dict
from iwm.downstream.progress import TaskInfo, TrainedHead
from iwm.downstream.registry import lookup
from iwm.downstream.restore import split_state
from iwm.encoder_outputs import EncoderName
from iwm.export.timm_config import timm_config
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from iwm.training.checkpoint import CheckpointError, versions
from iwm.training.export_files import (
    DESCRIPTION,
    ENCODER,
    FORMAT,
    HEAD,
    PREDICTOR,
    damaged,
    incomplete,
    read_description,
    read_tensors,
)
from shards.atomic import sync_folder, write_atomically

TIMM_CONFIG, HEAD_DESCRIPTION, CARD = "config.json", "head.json", "README.md"

LINEAR = {"head.fc.weight": "head.weight", "head.fc.bias": "head.bias"}
"""Tensor names of a linear head, and their names in timm's VisionTransformer."""


@dataclass(frozen=True)
class Provenance:
    """Origin of a model."""

    name: str
    """Folder of the run and file of the checkpoint, for example 'demo/step-000002000.pt'."""
    step: int
    """Optimiser steps taken."""
    samples: int
    """Images trained on."""


@dataclass(frozen=True)
class ExportedModel:
    """Content of an exported folder, except for its card."""

    config: Config
    encoder_name: EncoderName
    origin: Provenance
    encoder: dict[str, Tensor]
    predictor: dict[str, Tensor] | None
    """None where the encoder was finetuned."""
    head: TrainedHead | None = None
    trained: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the head apart from the encoder, by the trial's names."""


def attach_head(exported: ExportedModel, head: TrainedHead | None, tensors: Mapping[str, Tensor]) -> ExportedModel:
    """Return `exported` with the head of a protocol (restore.load_head). tensors: those of the head's trial."""
    if head is None:
        return exported
    encoder, others = split_state(tensors)
    if encoder is None:
        return replace(exported, head=head, trained=others)
    return replace(exported, head=head, trained=others, encoder=encoder, predictor=None)


def timm_state(exported: ExportedModel) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors of timm's VisionTransformer, and the class names of its linear head (empty: no head)."""
    head = exported.head
    if head is None or not lookup(head.protocol).linear:
        return exported.encoder, ()
    (task,) = head.tasks.values()
    return exported.encoder | {timm_name: exported.trained[name] for name, timm_name in LINEAR.items()}, task.classes


def write_export(
    exported: ExportedModel, card: str, out: Path, write_more: Callable[[Path], None] = lambda folder: None
) -> None:
    """Write the folder. Where `out` already has the same weights, its other files are overwritten.

    write_more: function that writes further files into the folder that it is given, before the folder is put in place.
    Raises CheckpointError where `out` has other content, OSError where it cannot be written.
    """
    files = _files(exported) | {CARD: card.encode()}
    weights = {name for name in files if name.endswith(".safetensors")}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        for name, content in files.items():
            write_atomically(partial / name, content)
        write_more(partial)
        if out.is_dir() and any(out.iterdir()):
            existing = {path.name for path in out.glob("*.safetensors")}
            if existing != weights or set(filecmp.cmpfiles(partial, out, weights, shallow=False)[0]) != weights:
                raise CheckpointError(f"{out} contains another model or other files; use another folder, or delete it")
            for path in sorted(partial.iterdir()):
                os.replace(path, out / path.name)
            sync_folder(out)
        elif out.exists() and not out.is_dir():
            raise CheckpointError(f"{out} is a file; give a folder")
        else:
            os.replace(partial, out)
            sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(exported: ExportedModel) -> dict[str, bytes]:
    """Return the content of each file by name, except for the card."""
    encoder, classes = timm_state(exported)
    interpolation = exported.head.interpolation if exported.head else "linear"
    files = {
        ENCODER: _packed(encoder),
        TIMM_CONFIG: _json(timm_config(exported.config, classes, interpolation)),
        DESCRIPTION: _json(_description(exported)),
    }
    if exported.predictor is not None:
        files[PREDICTOR] = _packed(exported.predictor)
    if exported.trained and not classes:
        files[HEAD] = _packed(exported.trained)
    if exported.head is not None:
        files[HEAD_DESCRIPTION] = _json(asdict(exported.head))
    return files


def read_export(folder: Path) -> ExportedModel:
    """Read an exported folder, on the CPU. Raises CheckpointError for missing or damaged files."""
    path = folder / DESCRIPTION
    try:
        description = read_description(folder)
        head = None
        if (folder / HEAD_DESCRIPTION).exists():
            path = folder / HEAD_DESCRIPTION
            head = _head(json.loads(path.read_bytes()))
        encoder = read_tensors(folder / ENCODER)
        if head is not None and lookup(head.protocol).linear:
            trained = {name: encoder.pop(timm_name) for name, timm_name in LINEAR.items()}
        else:
            trained = read_tensors(folder / HEAD) if head else {}
        finetuned = head is not None and lookup(head.protocol).finetunes_encoder(head)
        return ExportedModel(
            config=from_dict(description["config"]),
            encoder_name=description["encoder"],
            origin=Provenance(**description["origin"]),
            encoder=encoder,
            predictor=None if finetuned else read_tensors(folder / PREDICTOR),
            head=head,
            trained=trained,
        )
    except OSError as error:
        raise incomplete(folder, error) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ConfigError) as error:
        raise damaged(path, error) from error


def _head(description: dict[str, Any]) -> TrainedHead:
    tasks = {
        name: TaskInfo(**{**task, "classes": tuple(task["classes"])}) for name, task in description["tasks"].items()
    }
    return TrainedHead(**{**description, "tasks": tasks})


def _description(exported: ExportedModel) -> dict[str, object]:
    config = exported.config
    spec = action_spec(config.action, config.views)
    return {
        "format": FORMAT,
        "encoder": exported.encoder_name,
        "origin": asdict(exported.origin),
        "patch_grid": [config.grid_size, config.grid_size],
        "width": config.encoder.embed_dim,
        "pixels": {"size": config.views.size, "from": [0, 1], "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        "action": {
            "conditioning": config.action.conditioning,
            "jitter": spec.jitter_encoding,
            "entries": action_schema(config, spec),
        },
        "config": to_dict(config),
        "versions": versions(),
    }


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    content: bytes = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    return content


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()

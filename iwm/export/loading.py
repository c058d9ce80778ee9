"""Loading of pretrained models from runs, checkpoints and exported folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from iwm.actions import action_spec
from iwm.downstream.registry import lookup
from iwm.downstream.restore import BACKBONE
from iwm.encoder_outputs import EncoderName
from iwm.export.folder import ExportedModel, Provenance, read_export
from iwm.export.model import PretrainedModel
from iwm.models.attention import to_device
from iwm.models.encoder import Encoder
from iwm.models.predictor import Predictor
from iwm.training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, resolve, run_dir_of
from iwm.training.export_files import is_export_dir
from iwm.training.runtime import select_device
from shards.errors import one_line


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    encoder: EncoderName | None = None,
    resize: bool = True,
) -> PretrainedModel:
    """Load a run's newest checkpoint, one checkpoint file, or a folder that `iwm export` wrote.

    encoder: `teacher` (EMA target encoder) or `student` (context encoder). Default: the teacher; for an exported folder
    the encoder that it contains. resize: False refuses images of another size than the run's. Raises CheckpointError
    for a missing, damaged or other file, and ConfigError for an unavailable device.
    """
    path, device = Path(path), torch.device(device)
    select_device(device.type, "device")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of an exported model; give its folder, {path.parent}")
    if is_export_dir(path):
        exported = read_export(path)
        if encoder not in (None, exported.encoder_name):
            raise CheckpointError(
                f"{path} contains only the {exported.encoder_name} encoder; export the {encoder} encoder too"
            )
    elif path.is_dir() and not list_checkpoints(path):
        raise CheckpointError(
            f"{path} is neither a run's folder (it has no checkpoints/step-*.pt) nor an exported model"
        )
    else:
        exported = read_checkpoint(path, encoder or "teacher")
    model = build_model(exported, path, device)
    model.resize = resize
    return model


def read_checkpoint(path: Path, which: EncoderName) -> ExportedModel:
    """Return the exported content of a checkpoint, or of a run's newest one, without a head.

    Raises CheckpointError as `load_checkpoint` does.
    """
    file = resolve(path)
    content = load_checkpoint(file)
    name = f"{run_dir_of(file.resolve()).name}/{file.name}"
    encoder = "target_encoder." if which == "teacher" else "encoder."
    return ExportedModel(
        config=content.config,
        encoder_name=which,
        origin=Provenance(name, content.step, content.samples),
        encoder=_with_prefix(encoder, content.model),
        predictor=_with_prefix("predictor.", content.model),
    )


def _with_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def build_model(exported: ExportedModel, path: Path, device: torch.device) -> PretrainedModel:
    """Build the model and load its tensors. Raises CheckpointError, naming `path`, where they do not fit."""
    config, head = exported.config, exported.head
    encoder = Encoder(config.encoder, config.views.size)
    predictor = Predictor(config, action_spec(config.action, config.views).size) if exported.predictor else None
    model = PretrainedModel(encoder, predictor, config, exported.encoder_name, exported.origin, head)
    _load_strict(encoder, exported.encoder, "encoder", path)
    if predictor is not None and exported.predictor is not None:
        _load_strict(predictor, exported.predictor, "predictor", path)
    if model.trial is not None:
        finetuned = exported.encoder if head is not None and lookup(head.protocol).finetunes_encoder(head) else {}
        backbone = {f"{BACKBONE}{name}": tensor for name, tensor in finetuned.items()}
        _load_strict(model.trial, exported.trained | backbone, "head", path)
    to_device(model, device, config.train.attention_impl)
    return model


def _load_strict(part: nn.Module, tensors: Mapping[str, Tensor], name: str, path: Path) -> None:
    try:
        part.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        details = one_line(error)
        raise CheckpointError(f"{path}: the {name} does not fit the configuration ({details})") from error

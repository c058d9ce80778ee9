"""Export of a run's checkpoint as a folder: weights, description and model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from iwm.config import ConfigError, EncoderName
from iwm.downstream.progress import TrainedHead
from iwm.downstream.restore import load_head
from iwm.export.folder import attach_head, write_export
from iwm.export.model import build_model, read_checkpoint
from iwm.export.model_card import model_card
from iwm.training.checkpoint import CheckpointError, file_digest, list_checkpoints, resolve, run_dir_of


def export_run(source: Path, out: Path, encoder: EncoderName | None, head_folder: Path | None) -> None:
    """Write the folder. Raise CheckpointError, ConfigError or OSError; none of them leaves a partial folder."""
    head, tensors = load_head(head_folder) if head_folder else (None, {})
    checkpoint = _checkpoint_of(head, head_folder, source)
    exported = attach_head(read_checkpoint(checkpoint, _encoder_of(head, head_folder, encoder)), head, tensors)
    # Build the model before writing, so that inconsistent parts are not exported.
    model = build_model(exported, head_folder or checkpoint, torch.device("cpu"))
    write_export(exported, model_card(model, evaluated_mrr(checkpoint), out.name), out)


def _checkpoint_of(head: TrainedHead | None, head_folder: Path | None, source: Path) -> Path:
    """Return the checkpoint to export. With a head, it is the one that the head was trained on."""
    if head is None:
        return resolve(source)
    name, digits = head.checkpoint.split()
    candidates = list_checkpoints(source) or [source]
    found = next((path for path in candidates if path.name == name), None)
    if found is None:
        raise CheckpointError(
            f"{head_folder} was trained on {name}, which {source} does not contain; use the run of that checkpoint, or "
            "train the head again"
        )
    if file_digest(found) != digits:
        raise CheckpointError(
            f"{head_folder} was trained on another {name} than {found}; use the run that it was trained on"
        )
    return found


def _encoder_of(head: TrainedHead | None, head_folder: Path | None, encoder: EncoderName | None) -> EncoderName:
    if head is None:
        return encoder or "teacher"
    if encoder not in (None, head.features):
        raise ConfigError(f"--encoder {encoder}: {head_folder} was trained on the {head.features}; omit --encoder")
    return head.features


def evaluated_mrr(checkpoint: Path) -> dict[str, Any] | None:
    """Return RUN/eval/mrr.json if it names this checkpoint and is newer than it, else None."""
    path = run_dir_of(checkpoint) / "eval" / "mrr.json"
    if not path.exists() or path.stat().st_mtime < checkpoint.stat().st_mtime:
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
        return result if Path(result["checkpoint"]).name == checkpoint.name else None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an evaluation result ({error!r}); delete it or evaluate again") from error

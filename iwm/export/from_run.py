"""Export of a run's checkpoint as a folder: weights, description and model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from iwm.config import Config, ConfigError
from iwm.downstream.progress import TrainedHead
from iwm.downstream.restore import load_head
from iwm.encoder_outputs import EncoderName
from iwm.export.evaluations import read_results
from iwm.export.folder import attach_head, write_export
from iwm.export.graphs import GraphFormat, check_formats, write_graphs
from iwm.export.loading import build_model, read_checkpoint
from iwm.export.model_card import model_card
from iwm.training.checkpoint import CheckpointError, file_digest, list_checkpoints, resolve, run_dir_of
from shards.format import MANIFEST, load_manifest
from shards.urls import is_url


@dataclass(frozen=True)
class ExportExtras:
    """Choices of an export beside the model itself."""

    license: str | None = None
    """Identifier of the weights' license for the card; None: not stated."""
    formats: tuple[GraphFormat, ...] = ()
    """Formats of graphs for deployment."""
    hub: str | None = None
    """Repository that the card's code loads from; None: the folder."""


def export_run(
    source: Path,
    out: Path,
    encoder: EncoderName | None,
    head_folder: Path | None,
    extras: ExportExtras = ExportExtras(),
) -> list[str]:
    """Write the folder; return what the user should know.

    Raise CheckpointError, ConfigError, ReportError or OSError; none of them leaves a partial folder.
    """
    check_formats(extras.formats)
    head, tensors = load_head(head_folder) if head_folder else (None, {})
    checkpoint = _checkpoint_of(head, head_folder, source)
    exported = attach_head(read_checkpoint(checkpoint, _encoder_of(head, head_folder, encoder)), head, tensors)
    # Build the model before writing, so that inconsistent parts are not exported.
    model = build_model(exported, head_folder or checkpoint, torch.device("cpu"))
    results = read_results(checkpoint)
    card = model_card(
        model,
        results,
        out.name,
        images=_training_images(exported.config),
        license=extras.license,
        formats=extras.formats,
        hub=extras.hub,
    )
    write_export(exported, card, out, lambda folder: write_graphs(exported, model, extras.formats, folder))
    if model.predictor is None or results.mrr is not None:
        return []
    return [
        f"the card has no MRR of {checkpoint.name}: run iwm evaluate mrr --checkpoint {run_dir_of(checkpoint)} first, "
        "and export again"
    ]


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


def _training_images(config: Config) -> int | None:
    """Return the number of images of the run's training data; None where its shards are not found."""
    data = config.data
    # Shards at a URL are not asked for: an export does not need a network.
    found = not is_url(data.shards) and (Path(data.shards) / MANIFEST).exists()
    return load_manifest(Path(data.shards), data.train).samples if found else None

"""Results of downstream protocols, read from RUN/eval/*.json: trials, and scores over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from iwm.downstream.registry import PROTOCOLS
from iwm.evaluation.paper_results import IJEPA
from iwm.report.runs import ReportError, RunResults
from shards.listing import LABEL

SEGMENTATION = "segmentation"

EXTERNAL_NAMES = {
    "mae": "MAE",
    "ijepa": "I-JEPA",
    "moco_v3": "MoCo v3",
    "dino": "DINO",
    "ibot": "iBOT",
    "timm": "timm's ViT",
}
"""Names of external encoders as in the paper."""

IGNORED_SETTINGS = {"seed", "seeds", "checkpoint", "output", "device", "num_threads", "activation_checkpointing"}
"""Settings that may differ between trials of one seed group. The checkpoint's file name is compared separately."""

NOT_SETTINGS = {"seed", "skipped_steps", "parameters", "images_per_second"}
"""Scalar fields of a trial that are not settings. Nested fields (top1, miou, best, …) are metrics too."""


@dataclass(frozen=True)
class Metric:
    """Share (0 to 1), with its standard error over held-out images if it is a mean over them."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class TaskResult:
    """Data and classes of a task."""

    data: str
    """Name of the shard folder, with the label column where it is not `label`."""
    classes: int
    chance: float | None
    train_images: int
    val_images: int
    selection_images: int | None
    """Number of training images that were held out, by which trials and epochs were chosen; None: there were none."""


@dataclass(frozen=True)
class TrialResult:
    """One trained trial. `scores` by task: top-1 accuracy, or mIoU for segmentation; empty if it diverged."""

    name: str
    settings: dict[str, Any]
    """Settings that distinguish trials except the seed: lr, features, predictor, actions, tokens, …"""
    seed: int
    scores: dict[str, Metric]
    best: tuple[float, float] | None
    """Score of the best epoch on the held-out split (mean over tasks), and the epoch."""
    selection: float | None
    """Score of the best epoch (mean over tasks) on training images that were held out; None: there were none."""
    parameters: int | None
    """Number of trained parameters."""
    skipped_steps: int
    images_per_second: float | None


@dataclass(frozen=True)
class ProtocolResult:
    """One result file. `tasks` has several entries only for multitask finetuning."""

    name: str
    """File name without suffix."""
    protocol: str
    training: str
    """Name of the training folder next to the file."""
    checkpoint: str
    """File name of the checkpoint."""
    kind: str
    """Format of the encoder: `iwm` or a key of EXTERNAL_NAMES."""
    encoder: str
    """Description of the encoder's architecture."""
    tasks: dict[str, TaskResult]
    epochs: float
    steps: int
    batch: int
    settings: str
    """Settings of the command as JSON, without seeds and paths. Trials of one seed group have the same."""
    trials: list[TrialResult]
    selection: str
    """Images by which trials and epochs were chosen: `train`, `val`, or `none`, as in iwm.downstream.progress."""

    @property
    def choice(self) -> str:
        """Phrase that says on which images trials and epochs were chosen."""
        counts = [f"{task.selection_images:,}" for task in self.tasks.values() if task.selection_images is not None]
        if counts:
            return f"chosen on {' and '.join(counts)} held-out training images"
        return "nothing chosen" if self.selection == "none" else "chosen on the held-out images"

    @property
    def metric(self) -> str:
        """Field of the scores in metrics.jsonl."""
        return "miou" if self.protocol == SEGMENTATION else "top1"

    @property
    def data(self) -> str:
        return ", ".join(dict.fromkeys(task.data for task in self.tasks.values()))


@dataclass(frozen=True)
class DatasetResults:
    """Results of one run on one data set."""

    name: str
    """Run, method and length of pretraining."""
    data: str
    records: list[ProtocolResult]

    @property
    def large(self) -> bool:
        """True where the encoder is a ViT-L (table S4)."""
        return "ViT 24×1024" in self.records[0].encoder


@dataclass(frozen=True)
class SeedScores:
    """Scores of trials that differ only in their seed."""

    record: ProtocolResult
    task: TaskResult
    seeds: dict[int, Metric]
    parameters: int | None
    """Number of trained parameters of each trial."""
    images_per_second: float | None
    """Mean training speed over the seeds."""
    selection: float | None
    """Mean over the seeds of the scores on held-out training images; None where a trial has none."""

    @property
    def mean(self) -> float:
        return statistics.mean(measure.mean for measure in self.seeds.values())

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; for a single seed the standard error over images."""
        if len(self.seeds) > 1:
            return statistics.stdev(measure.mean for measure in self.seeds.values())
        return next(iter(self.seeds.values())).error


def read_dataset_results(run: RunResults) -> list[DatasetResults]:
    """Return the run's downstream results by data set; other evaluations are ignored.

    Raises ReportError, which names the file, for an incomplete result and an invalid config.yaml.
    """
    by_data: dict[str, list[ProtocolResult]] = {}
    for record in _records(run):
        by_data.setdefault(record.data, []).append(record)
    return [DatasetResults(_named(run, records[0]), data, records) for data, records in by_data.items()]


def best_trials(
    records: Sequence[ProtocolResult], protocol: str, selects: Callable[[TrialResult], bool], task: str = ""
) -> SeedScores | None:
    """Return the settings with the highest mean over seeds among the selected trials; None without scores.

    The mean is that on held-out training images where all of them have one, otherwise that on the held-out split.
    Trials of several results form one seed group if settings, checkpoint, epochs, batch size and task are the same.
    """
    groups: dict[str, list[tuple[ProtocolResult, TrialResult]]] = {}
    for record in records:
        if record.protocol == protocol and task in record.tasks:
            for trial in record.trials:
                if task in trial.scores and selects(trial):
                    training = (record.checkpoint, record.epochs, record.batch, record.settings)
                    key = (sorted(trial.settings.items()), training, record.tasks[task])
                    groups.setdefault(repr(key), []).append((record, trial))
    scores = []
    for group in groups.values():
        record = group[0][0]
        chosen_by = [trial.selection for _, trial in group if trial.selection is not None]
        rates = [trial.images_per_second for _, trial in group if trial.images_per_second is not None]
        scores.append(
            SeedScores(
                record,
                record.tasks[task],
                {trial.seed: trial.scores[task] for _, trial in group},
                group[0][1].parameters,
                statistics.mean(rates) if rates else None,
                statistics.mean(chosen_by) if len(chosen_by) == len(group) else None,
            )
        )
    return best_choice(scores, lambda score: score.mean)


CandidateT = TypeVar("CandidateT", SeedScores, TrialResult)


def best_choice(candidates: Sequence[CandidateT], mean: Callable[[CandidateT], float]) -> CandidateT | None:
    """Return the candidate with the best score on held-out training images, if all have one, otherwise by `mean`.

    None without candidates.
    """
    chosen_by = [candidate.selection for candidate in candidates]
    known = [score for score in chosen_by if score is not None]
    scores = known if len(known) == len(chosen_by) else list(map(mean, candidates))
    return candidates[scores.index(max(scores))] if scores else None


def _named(run: RunResults, record: ProtocolResult) -> str:
    config = run.parse_config()
    if config is None:
        return f"{run.name}, {EXTERNAL_NAMES.get(record.kind, record.kind)}"
    schedule = config.schedule
    length = f"{schedule.epochs:g} epochs" if schedule.steps is None else f"{schedule.steps:,} steps"
    method = f"IWM {config.predictor.depth}×{config.predictor.embed_dim}" if config.masking.type == "iwm" else IJEPA
    return f"{run.name}, {method}, {length}"


def _records(run: RunResults) -> list[ProtocolResult]:
    records = []
    for name, result in run.evaluations.items():
        if result["protocol"] in PROTOCOLS:
            try:
                records.append(protocol_result(name, result))
            except (KeyError, TypeError, AttributeError) as error:
                raise ReportError(
                    f"{run.folder / 'eval' / f'{name}.json'} is not a complete {result['protocol']} result "
                    f"({error!r}); delete it or evaluate again"
                ) from error
    return records


def protocol_result(file: str, result: dict[str, Any]) -> ProtocolResult:
    """Return the content of a result file of a protocol. file: its name. Raises KeyError for an incomplete result."""
    several = "tasks" in result
    tasks = result["tasks"] if several else {"": {"shards": result["data"]["shards"], **result}}
    return ProtocolResult(
        name=file,
        protocol=result["protocol"],
        training=result.get("training", file),
        checkpoint=Path(result["checkpoint"]).name,
        kind=result["encoder"]["format"],
        encoder=result["encoder"]["description"],
        tasks={name: _task(task, result["protocol"]) for name, task in tasks.items()},
        epochs=result["epochs"],
        steps=result["steps"],
        batch=result["batch_size"],
        settings=json.dumps(
            {name: value for name, value in result.get("settings", {}).items() if name not in IGNORED_SETTINGS},
            sort_keys=True,
        ),
        trials=[_trial(name, trial, several) for name, trial in result["trials"].items()],
        selection=result.get("selection", "val"),
    )


def _task(task: dict[str, Any], protocol: str) -> TaskResult:
    folder, label = Path(task["shards"]), None if protocol == SEGMENTATION else task.get("label")
    name = folder.name if folder.name != "shards" else folder.parent.name
    return TaskResult(
        data=name if label in (None, LABEL) else f"{name} {label}",
        classes=task["classes"],
        chance=task.get("chance"),
        train_images=task["train_images"],
        val_images=task["val_images"],
        selection_images=task.get("selection_images"),
    )


def _trial(name: str, trial: dict[str, Any], several: bool) -> TrialResult:
    scores = {
        task: metrics.get("top1", metrics.get("miou"))
        for task, metrics in (trial.get("scores", {}) if several else {"": trial}).items()
    }
    best = trial.get("best")
    return TrialResult(
        name=name,
        settings={
            key: value for key, value in trial.items() if key not in NOT_SETTINGS and not isinstance(value, dict | list)
        },
        seed=trial["seed"],
        scores={
            task: Metric(score["mean"], score.get("standard_error"))
            for task, score in scores.items()
            if score is not None and score["mean"] is not None
        },
        best=(best["score"], best["epoch"]) if best else None,
        selection=best.get("selection") if best else None,
        parameters=trial.get("parameters"),
        skipped_steps=trial.get("skipped_steps", 0),
        images_per_second=trial.get("images_per_second"),
    )

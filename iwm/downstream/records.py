"""Results of downstream protocols, read back from RUN/eval/*.json: their arms, and scores over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from iwm.config import ConfigError, from_yaml
from iwm.evaluation.paper import IJEPA
from iwm.report.run_folder import ReportError, Run
from shards.listing import LABEL

SEGMENTATION = "segmentation"

PROTOCOLS = (
    "linear",
    "attentive",
    "finetune-encoder",
    "finetune-predictor",
    "finetune-end-to-end",
    "multitask",
    SEGMENTATION,
)
"""The protocols that train, as results name them."""

FOREIGN = {"mae": "MAE", "ijepa": "I-JEPA", "moco_v3": "MoCo v3", "dino": "DINO", "ibot": "iBOT", "timm": "timm's ViT"}
"""Encoders of other projects as the paper writes them."""

_NO_MATTER = {"seed", "seeds", "checkpoint", "output", "device", "threads", "activation_checkpointing"}
"""Settings that may differ between seeds of one thing; the checkpoint's name is compared on its own."""

_FIGURES = {"seed", "skipped_steps", "parameters", "images_per_second"}
"""Plain values of an arm that are no settings. What is nested (top1, miou, best, …) is a figure too."""


@dataclass(frozen=True)
class Measure:
    """A share, 0 to 1, with its standard error over held-out images where it is a mean over them."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Task:
    """What was learnt, and from what."""

    data: str
    """Name of the shard folder, with the label column where it is not `label`."""
    classes: int
    chance: float | None
    train_images: int
    val_images: int


@dataclass(frozen=True)
class Arm:
    """One thing that was trained. `scores` by task: top-1 accuracy, mIoU for segmentation; none where it diverged."""

    name: str
    settings: dict[str, Any]
    """All that tells arms apart but the seed: lr, features, predictor, latents, tokens, …"""
    seed: int
    scores: dict[str, Measure]
    best: tuple[float, float] | None
    """Its highest score, of several tasks their mean, and the epoch that it was seen after."""
    parameters: int | None
    """How many were trained."""
    skipped_steps: int
    images_per_second: float | None


@dataclass(frozen=True)
class Record:
    """A result. `tasks` has several entries for multitask finetuning alone."""

    name: str
    """Its file's, without the ending."""
    protocol: str
    training: str
    """The folder beside the file that the training lies in."""
    checkpoint: str
    """Its file's name."""
    kind: str
    """`iwm`, or which other encoder."""
    encoder: str
    """The encoder's shape in words."""
    tasks: dict[str, Task]
    epochs: float
    steps: int
    batch: int
    settings: str
    """Of the command, but for seeds and places of files: results with others are not seeds of one thing."""
    arms: list[Arm]

    @property
    def metric(self) -> str:
        """What scores are, as metrics.jsonl calls it."""
        return "miou" if self.protocol == SEGMENTATION else "top1"

    @property
    def data(self) -> str:
        return ", ".join(dict.fromkeys(task.data for task in self.tasks.values()))


@dataclass(frozen=True)
class Subject:
    """A run's results of one data set."""

    name: str
    """The run, its method and how long it was pretrained."""
    data: str
    records: list[Record]

    @property
    def large(self) -> bool:
        """Whether the encoder is a ViT-L (table S4)."""
        return "ViT 24×1024" in self.records[0].encoder


@dataclass(frozen=True)
class Score:
    """Arms that differ in nothing but their seed."""

    record: Record
    task: Task
    by_seed: dict[int, Measure]
    parameters: int | None
    """How many each trained."""
    images_per_second: float | None
    """Mean over the seeds."""

    @property
    def mean(self) -> float:
        return statistics.mean(measure.mean for measure in self.by_seed.values())

    @property
    def spread(self) -> float | None:
        """Of one seed the standard error over images, of several the sample standard deviation over them."""
        if len(self.by_seed) > 1:
            return statistics.stdev(measure.mean for measure in self.by_seed.values())
        return next(iter(self.by_seed.values())).error


def read_subjects(run: Run) -> list[Subject]:
    """The run's downstream results by data set; other evaluations are left aside.

    Raises ReportError, naming the file, for a result that lacks what every result has and a config.yaml that is none.
    """
    by_data: dict[str, list[Record]] = {}
    for record in _records(run):
        by_data.setdefault(record.data, []).append(record)
    return [Subject(_named(run, records[0]), data, records) for data, records in by_data.items()]


def best(records: Sequence[Record], protocol: str, wanted: Callable[[Arm], bool], task: str = "") -> Score | None:
    """Of the arms that are wanted, the settings with the highest mean over seeds; None where none has a score.

    Arms of several results are seeds of one thing where settings, checkpoint, length, batch and images are the same.
    """
    groups: dict[str, list[tuple[Record, Arm]]] = {}
    for record in records:
        if record.protocol == protocol and task in record.tasks:
            for arm in record.arms:
                if task in arm.scores and wanted(arm):
                    training = (record.checkpoint, record.epochs, record.batch, record.settings)
                    same = (sorted(arm.settings.items()), training, record.tasks[task])
                    groups.setdefault(repr(same), []).append((record, arm))
    scores = []
    for group in groups.values():
        record = group[0][0]
        rates = [arm.images_per_second for _, arm in group if arm.images_per_second is not None]
        scores.append(
            Score(
                record,
                record.tasks[task],
                {arm.seed: arm.scores[task] for _, arm in group},
                group[0][1].parameters,
                statistics.mean(rates) if rates else None,
            )
        )
    return max(scores, key=lambda score: score.mean, default=None)


def _named(run: Run, record: Record) -> str:
    if run.config is None:
        return f"{run.name}, {FOREIGN.get(record.kind, record.kind)}"
    try:
        config = from_yaml(run.config)
    except (ConfigError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise ReportError(f"{run.folder / 'config.yaml'}: {message}; leave this run out, or mend the file") from error
    schedule = config.schedule
    length = f"{schedule.epochs:g} epochs" if schedule.steps is None else f"{schedule.steps:,} steps"
    method = f"IWM {config.predictor.depth}×{config.predictor.width}" if config.masking.kind == "iwm" else IJEPA
    return f"{run.name}, {method}, {length}"


def _records(run: Run) -> list[Record]:
    records = []
    for name, result in run.evaluations.items():
        if result["protocol"] in PROTOCOLS:
            try:
                records.append(_record(name, result))
            except (KeyError, TypeError, AttributeError) as error:
                raise ReportError(
                    f"{run.folder / 'eval' / f'{name}.json'} is no whole {result['protocol']} result ({error!r}); "
                    "delete it or evaluate again"
                ) from error
    return records


def _record(file: str, result: dict[str, Any]) -> Record:
    several = "tasks" in result
    tasks = result["tasks"] if several else {"": {"shards": result["data"]["shards"], **result}}
    return Record(
        name=file,
        protocol=result["protocol"],
        training=result.get("training", file),
        checkpoint=Path(result["checkpoint"]).name,
        kind=result["encoder"]["kind"],
        encoder=result["encoder"]["description"],
        tasks={name: _task(task, result["protocol"]) for name, task in tasks.items()},
        epochs=result["epochs"],
        steps=result["steps"],
        batch=result["batch"],
        settings=json.dumps(
            {name: value for name, value in result.get("settings", {}).items() if name not in _NO_MATTER},
            sort_keys=True,
        ),
        arms=[_arm(name, arm, several) for name, arm in result["arms"].items()],
    )


def _task(task: dict[str, Any], protocol: str) -> Task:
    folder, label = Path(task["shards"]), None if protocol == SEGMENTATION else task.get("label")
    name = folder.name if folder.name != "shards" else folder.parent.name
    return Task(
        data=name if label in (None, LABEL) else f"{name} {label}",
        classes=task["classes"],
        chance=task.get("chance"),
        train_images=task["train_images"],
        val_images=task["val_images"],
    )


def _arm(name: str, arm: dict[str, Any], several: bool) -> Arm:
    scores = {
        task: figures.get("top1", figures.get("miou"))
        for task, figures in (arm.get("scores", {}) if several else {"": arm}).items()
    }
    best = arm.get("best")
    return Arm(
        name=name,
        settings={
            key: value for key, value in arm.items() if key not in _FIGURES and not isinstance(value, dict | list)
        },
        seed=arm["seed"],
        scores={
            task: Measure(score["mean"], score.get("standard_error"))
            for task, score in scores.items()
            if score is not None and score["mean"] is not None
        },
        best=(best["score"], best["epoch"]) if best else None,
        parameters=arm.get("parameters"),
        skipped_steps=arm.get("skipped_steps", 0),
        images_per_second=arm.get("images_per_second"),
    )

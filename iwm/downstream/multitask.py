"""Multitask finetuning of the predictor (paper, 5.2, A.2, figure S2, table 7), and its single-task controls.

One predictor learns all tasks at once: a learned token tells it which, each task has a head, losses are summed. Each
step has --batch images of every task. A control is a predictor trained for one task alone, on the same images, for the
same number of steps. All share the frozen encoder's forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from iwm.config import ConfigError
from iwm.downstream.arms import FinetunedPredictor, MultitaskPredictor
from iwm.downstream.bench import Bench, column_of, open_task
from iwm.downstream.classification import Classification, Column, classes_of
from iwm.downstream.example import labelled
from iwm.downstream.finetuning import Kind, PredictorFinetuning, attentive_head, predictor_of
from iwm.downstream.kept import KeptFeatures
from iwm.downstream.protocol import Made, run
from iwm.downstream.results import percent
from iwm.downstream.settings import crops_of, need_each_once
from iwm.downstream.study import FrozenEncoders
from iwm.evaluation.bank import Context
from iwm.models.reader import Reader
from iwm.training.signals import StopWish


@dataclass(frozen=True)
class Settings(PredictorFinetuning):
    """One predictor for several tasks, beside one for each: token and head per task, the batch split evenly."""

    tasks: tuple[str, ...] = ()
    """Each is a label column of the run's shards (as `colour`), or FOLDER:COLUMN of others (as data/inat18:label), with
    the same names of splits. An epoch is one of the first."""
    predictors: tuple[Kind, ...] = ("pretrained",)
    features: Context = "teacher"
    """Frozen encoder that they are put on: `teacher` (target encoder) or `student` (context encoder)."""
    controls: bool = True
    """Also a predictor for each task alone."""
    batch: int = 512
    """Images of each task per optimiser step, over all processes; a step has so many times the number of tasks."""
    epochs: float = 50.0

    def check(self) -> None:
        super().check()
        need_each_once("--predictors", self.predictors)


def evaluate(bench: Bench, settings: Settings, wish: StopWish) -> dict[str, Any] | None:
    """Train and judge; None where `wish` ended it early. Raises ConfigError and ShardError."""
    pretrained, device = bench.pretrained, bench.here.device
    columns = _columns(bench, settings)
    shared = FrozenEncoders({settings.features: pretrained.encoder(settings.features)})
    kept = shared if settings.keep_features else None
    crops = crops_of(settings.crops, pretrained)
    names = {}
    for column in columns:
        with _naming(column):
            names[column.name] = classes_of(column, bench.here).names
    classes = [len(each) for each in names.values()]

    def opened(fitted: Bench) -> list[Classification | KeptFeatures]:
        tasks = []
        for number, column in enumerate(columns):
            with _naming(column):
                tasks.append(open_task(fitted, column, crops, settings.mixing, kept, number=number))
        return tasks

    prefix, everything = pretrained.teacher.prefix, tuple(range(len(columns)))
    made = {}
    for kind, seed in product(settings.predictors, settings.seeds):
        facts = {"lr": settings.lr, "seed": seed, "features": settings.features, "predictor": kind}
        behind = ", ".join(
            word for word, among in ((kind, settings.predictors), (f"seed {seed}", settings.seeds)) if len(among) > 1
        )
        behind = f", {behind}" if behind else ""

        def reader_of(tokens: int, kind: Kind = kind, seed: int = seed) -> Reader:
            predictor = predictor_of(pretrained, kind, seed, settings.fresh)
            return Reader(
                predictor,
                tasks=tokens,
                drop_path=settings.drop_path,
                checkpointing=settings.activation_checkpointing,
                seed=seed,
            )

        reader = reader_of(len(columns))
        heads = [attentive_head(reader, pretrained, count, seed) for count in classes]
        arm = MultitaskPredictor(reader, heads, settings.features, prefix).to(device)
        optimizer = settings.optimizer_of(arm, kind)
        made[f"multitask{behind}"] = Made(arm, optimizer, facts, everything)
        for number in everything if settings.controls else ():
            reader = reader_of(0)
            head = attentive_head(reader, pretrained, classes[number], seed)
            alone = FinetunedPredictor(reader, head, settings.features, prefix, task=number).to(device)
            optimizer = settings.optimizer_of(alone, kind)
            made[f"single-{columns[number].name}{behind}"] = Made(alone, optimizer, facts, (number,))
    return run(
        bench,
        opened,
        made,
        shared,
        wish,
        example=labelled(pretrained, classes, device),
        kept=columns if kept else [],
        to_keep={"classes": names},
    )


@contextmanager
def _naming(column: Column) -> Iterator[None]:
    """Say in a ConfigError which of --tasks it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"--tasks {column.name}: {error}") from error


def _columns(bench: Bench, settings: Settings) -> list[Column]:
    if len(settings.tasks) < 2 or len(set(settings.tasks)) < len(settings.tasks):
        raise ConfigError("--tasks: name at least two, each once, as --tasks label colour or --tasks data/in1k:label …")
    columns = []
    for task in settings.tasks:
        folder, _, label = task.rpartition(":")
        column = column_of(bench, label, task)
        columns.append(replace(column, shards=Path(folder)) if folder else column)
    return columns


def table(result: dict[str, Any]) -> Table:
    """The paper's table 7: each task alone, all at once, and the difference."""
    tasks = result["tasks"]
    facts = ", ".join(
        f"{name}: {task['train_images']:,} training and {task['val_images']:,} held-out images, chance "
        f"{100 * task['chance']:.1f}"
        for name, task in tasks.items()
    )
    made = Table(
        title="Multitask finetuning of the predictor: accuracy of the last epoch in % ± standard error",
        caption=f"{result['steps']:,} steps of {result['batch']:,} images. {facts}",
        box=SIMPLE_HEAD,
    )
    for column in ("task", "single-task", "multitask", "difference"):
        made.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for name in result["arms"]:
        if not name.startswith("multitask"):
            continue
        behind = name.removeprefix("multitask")
        together = result["arms"][name]["scores"]
        for task in tasks:
            control = result["arms"].get(f"single-{task}{behind}")
            own = together[task]["top1"]
            alone = control["scores"][task]["top1"] if control else None
            made.add_row(
                f"{task}{behind}",
                percent(alone) if alone else "",
                percent(own),
                f"{100 * (own['mean'] - alone['mean']):+.1f}" if alone else "",
            )
    return made

"""Multitask finetuning of the predictor (paper, 5.2, A.2, figure S2, table 7), and its single-task controls.

One predictor learns all tasks at once. Each task has a learned token and a head, and the losses are summed. Each step
has --batch-size images of every task. A control is a predictor that is trained for one task, on the same images and for
the same number of steps. All trials share the frozen encoder's forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

from iwm.config import ConfigError
from iwm.downstream.cached_features import CachedFeatures
from iwm.downstream.context import RunContext, Runner, column_of, open_task
from iwm.downstream.cost import dummy_labelled_batch
from iwm.downstream.experiment import TrialSpec, format_percent, run_trials, selection_note, varied
from iwm.downstream.finetuning import attentive_head, optimizer_of, predictor_of
from iwm.downstream.protocol_settings import MultitaskSettings, PredictorInit
from iwm.downstream.settings import sized_crops
from iwm.downstream.study import FrozenEncoders
from iwm.downstream.tasks import ClassificationTask, LabelColumn, classes_of
from iwm.downstream.trials import FinetunedPredictor, MultitaskPredictor
from iwm.evaluation.result_table import ResultTable
from iwm.models.predictor_backbone import PredictorBackbone
from iwm.training.runtime import StopFlag
from shards.cache import local_folder


def run_multitask(context: RunContext, settings: MultitaskSettings, stop: StopFlag) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    pretrained, device = context.pretrained, context.dist.device
    columns = _columns(context, settings)
    shared = FrozenEncoders({name: pretrained.encoder(name) for name in settings.encoder})
    cached = shared if settings.cache_features else None
    crops = sized_crops(settings.crops, pretrained.img_size)
    names = {}
    for column in columns:
        with _naming(column):
            names[column.name] = classes_of(column, context.dist).names
    classes = [len(of_task) for of_task in names.values()]

    def open_tasks(fitted: RunContext) -> list[ClassificationTask | CachedFeatures]:
        tasks = []
        for number, column in enumerate(columns):
            with _naming(column):
                tasks.append(open_task(fitted, column, crops, settings.mixup, cached, number=number))
        return tasks

    prefix, all_tasks = pretrained.teacher.num_prefix_tokens, tuple(range(len(columns)))
    specs = {}
    for kind, features, lr, seed in product(settings.predictors, settings.encoder, settings.lr, settings.seeds):
        metadata = {"lr": lr, "seed": seed, "features": features, "predictor": kind}
        words = varied(
            (kind, settings.predictors),
            (features, settings.encoder),
            (f"lr {lr:g}", settings.lr),
            (f"seed {seed}", settings.seeds),
        )
        suffix = "".join(f", {word}" for word in words)

        def new_predictor_backbone(tokens: int, kind: PredictorInit = kind, seed: int = seed) -> PredictorBackbone:
            predictor = predictor_of(pretrained, kind, seed, settings.random_predictor)
            return PredictorBackbone(
                predictor,
                num_tasks=tokens,
                drop_path=settings.drop_path,
                grad_checkpointing=settings.activation_checkpointing,
                seed=seed,
            )

        predictor_backbone = new_predictor_backbone(len(columns))
        heads = [attentive_head(predictor_backbone, pretrained, count, seed) for count in classes]
        trial = MultitaskPredictor(predictor_backbone, heads, features, prefix).to(device)
        optimizer = optimizer_of(trial, settings, kind, lr)
        specs[f"multitask{suffix}"] = TrialSpec(trial, optimizer, metadata, all_tasks)
        for number in all_tasks if settings.controls else ():
            predictor_backbone = new_predictor_backbone(0)
            head = attentive_head(predictor_backbone, pretrained, classes[number], seed)
            control = FinetunedPredictor(predictor_backbone, head, features, prefix, task=number).to(device)
            optimizer = optimizer_of(control, settings, kind, lr)
            specs[f"single-{columns[number].name}{suffix}"] = TrialSpec(control, optimizer, metadata, (number,))
    return run_trials(
        context,
        open_tasks,
        specs,
        shared,
        stop,
        example=dummy_labelled_batch(pretrained, classes, device),
        cached=columns if cached else [],
        best_metadata={"classes": names},
    )


@contextmanager
def _naming(column: LabelColumn) -> Iterator[None]:
    """Name the task of --tasks in a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"--tasks {column.name}: {error}") from error


def _columns(context: RunContext, settings: MultitaskSettings) -> list[LabelColumn]:
    if len(settings.tasks) < 2 or len(set(settings.tasks)) < len(settings.tasks):
        raise ConfigError(
            "--tasks: name at least two, each only once, for example --tasks label colour or --tasks data/in1k:label …"
        )
    columns = []
    for task in settings.tasks:
        folder, _, label = task.rpartition(":")
        column = replace(column_of(context, label, task), option="--tasks")
        columns.append(replace(column, shards=local_folder(folder, settings.data.cache, None)) if folder else column)
    return columns


def multitask_tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return the paper's table 7: accuracy of single-task and multitask training, and the difference."""
    tasks = result["tasks"]
    task_notes = ", ".join(
        f"{name}: {task['train_images']:,} training and {task['val_images']:,} held-out images, chance "
        f"{100 * task['chance']:.1f}"
        for name, task in tasks.items()
    )
    rows = []
    for name in result["trials"]:
        if not name.startswith("multitask"):
            continue
        suffix = name.removeprefix("multitask")
        together = result["trials"][name]["scores"]
        for task in tasks:
            control = result["trials"].get(f"single-{task}{suffix}")
            own = together[task]["top1"]
            alone = control["scores"][task]["top1"] if control else None
            rows.append(
                [
                    f"{task}{suffix}",
                    format_percent(alone) if alone else "",
                    format_percent(own),
                    f"{100 * (own['mean'] - alone['mean']):+.1f}" if alone else "",
                ]
            )
    title = "Multitask finetuning of the predictor: accuracy of the last epoch in % ± standard error"
    caption = f"{result['steps']:,} steps of {result['batch_size']:,} images. {task_notes}. {selection_note(result)}"
    return [ResultTable(title, ["task", "single-task", "multitask", "difference"], rows, caption)]


MULTITASK = Runner(run_multitask, multitask_tables)

"""Training and evaluation of a protocol's trials, and the result as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from dali_pipelines.crops import CropSettings
from iwm.config import ConfigError
from iwm.downstream.context import RunContext, open_task
from iwm.downstream.cost import MakeDummyBatch, count_parameters, dummy_labelled_batch, images_per_second
from iwm.downstream.micro_batch import choose_micro_batch, micro_batch_state, out_of_memory_error
from iwm.downstream.progress import Selection, TrainPlan, TrainProgress, choice_score
from iwm.downstream.registry import PROTOCOLS
from iwm.downstream.settings import MixupSettings, TrainSettings
from iwm.downstream.study import FrozenEncoders, Study, Task, Trial
from iwm.downstream.tasks import LabelColumn
from iwm.downstream.trainer import train
from iwm.evaluation.common import proportion_stderr
from iwm.evaluation.result_table import ResultTable
from iwm.training.optim import LrShape, lr_factor
from iwm.training.runtime import StopFlag

MAX_TIMED_IMAGES = 64
"""Largest number of images that a trial's speed is measured with where nothing is compiled."""


@dataclass(frozen=True)
class TrialSpec:
    """A trial on its device, with its optimiser and tasks."""

    trial: Trial
    optimizer: torch.optim.Optimizer
    metadata: dict[str, Any]
    """Settings that the result records: lr, seed, features, predictor, …"""
    task_ids: tuple[int, ...] = (0,)
    """Indices of the tasks that the trial learns."""


def run_trials(
    context: RunContext,
    open_tasks: Callable[[RunContext], Sequence[Task]],
    specs: Mapping[str, TrialSpec],
    encoders: FrozenEncoders,
    stop: StopFlag,
    *,
    example: MakeDummyBatch,
    shape: LrShape = "cosine",
    timed: bool = False,
    cached: Sequence[LabelColumn] = (),
    best_metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Train and evaluate the trials. Return None where the stop flag ended the training early.

    open_tasks: opens the tasks, once the micro-batch is known. example: makes dummy batches, with which memory is
    measured, and speed if `timed`. cached: columns whose frozen features are cached on the device. best_metadata:
    entries of best.pt that are needed to rebuild the trial. Returns the fields that every protocol's result has:
    trials with their scores, the chosen trial, metadata of the tasks, length of the training. Raises ConfigError where
    the device has too little memory.
    """
    study = Study(
        {name: spec.trial for name, spec in specs.items()}, encoders, [spec.metadata["seed"] for spec in specs.values()]
    )
    study.setup(context.dist.device, compiled=context.compiled, attention=context.pretrained.attention)
    selection = selection_of(context.settings, specs)
    context = replace(context, holds_out=selection == "train")
    try:
        context, choice = choose_micro_batch(context, study, example, cached)
        plan = _plan(context, open_tasks, specs, study, shape, selection, choice, best_metadata or {})
        progress = train(plan, context.dist, stop, context.last)
        if progress is None:
            return None
        rates = _rates(context, study, example if timed else None)
    except torch.OutOfMemoryError as error:
        raise out_of_memory_error(context) from error
    return _result(context, plan, progress, specs, rates)


def run_classification(
    context: RunContext,
    column: LabelColumn,
    crops: CropSettings,
    mixing: MixupSettings,
    names: Sequence[str],
    specs: Mapping[str, TrialSpec],
    encoders: FrozenEncoders,
    stop: StopFlag,
    *,
    cached: bool = False,
    timed: bool = False,
) -> dict[str, Any] | None:
    """Train and evaluate trials that classify one column (see run_trials).

    names: the column's classes. cached: `encoders` compute the features of centre crops once.
    """
    return run_trials(
        context,
        lambda fitted: [open_task(fitted, column, crops, mixing, encoders if cached else None)],
        specs,
        encoders,
        stop,
        example=dummy_labelled_batch(context.pretrained, [len(names)], context.dist.device),
        timed=timed,
        cached=[column] if cached else [],
        best_metadata={"classes": names},
    )


def varied(*words: tuple[str, Sequence[object]]) -> list[str]:
    """Return the words for a trial's name: each stands for one of the values beside it, if there are several."""
    return [word for word, values in words if len(values) > 1]


def selection_of(settings: TrainSettings, specs: Mapping[str, TrialSpec]) -> Selection:
    """Return the images of the choice. There is one between learning rates; other trials are compared, not chosen."""
    if settings.selection == "val":
        return "val"
    rates = {spec.metadata["lr"] for spec in specs.values()}
    return "train" if len(rates) > 1 else "none"


def _plan(
    context: RunContext,
    open_tasks: Callable[[RunContext], Sequence[Task]],
    specs: Mapping[str, TrialSpec],
    study: Study,
    shape: LrShape,
    selection: Selection,
    choice: str,
    best_metadata: Mapping[str, Any],
) -> TrainPlan:
    """Open the tasks and plan the training. choice: startup message about the micro-batch."""
    s, dist = context.settings, context.dist
    parts = (part for spec in specs.values() for part in spec.trial.modules())
    local_norm = any(isinstance(part, _BatchNorm) and not isinstance(part, SyncBatchNorm) for part in parts)
    if context.micro_batch < 2 and local_norm:
        raise ConfigError(
            "--batch-size, --micro-batch-size: a process has one image per pass, and batch norm needs at least two; "
            "increase them"
        )
    tasks = open_tasks(context)
    # The length is a number of images, so it does not depend on the number of processes or passes.
    per_epoch = tasks[0].images / s.batch_size
    steps = s.steps or max(1, round(s.epochs * per_epoch))
    warmup = round(steps * s.warmup_epochs / s.epochs)
    return TrainPlan(
        title=f"{context.name} · {context.folder}",
        folder=context.folder,
        identity=context.identity,
        study=study,
        tasks=tasks,
        task_ids=[spec.task_ids for spec in specs.values()],
        optimizers=[spec.optimizer for spec in specs.values()],
        lr_factor=lambda step: lr_factor(step, steps, warmup, shape),
        steps=steps,
        steps_per_epoch=per_epoch,
        batch_size=s.batch_size * len(tasks),
        accumulation=context.accumulation,
        bf16=context.pretrained.bf16,
        selection=selection,
        validate_every=s.validate_every,
        checkpoint_every=s.checkpoint_every,
        log_every=s.log_every,
        tensorboard=s.tensorboard,
        micro_batch_state=micro_batch_state(context),
        startup_messages=[
            f"{context.name}: {len(specs)} trials, {steps:,} steps of {s.batch_size * len(tasks):,} images, "
            f"{dist.size} processes on {dist.device.type}",
            choice,
        ],
        best_metadata={
            "protocol": context.name,
            "selection": selection,
            "settings": context.identity,
            "trial_metadata": {name: spec.metadata for name, spec in specs.items()},
            **best_metadata,
        },
    )


def _rates(context: RunContext, study: Study, example: MakeDummyBatch | None) -> list[float | None]:
    trials = len(study.names)
    if example is None or not context.dist.is_main:
        return [None] * trials
    # Compiled modules are measured with the shapes that they were compiled for.
    pixels, targets = example(context.micro_batch if context.compiled else min(context.micro_batch, MAX_TIMED_IMAGES))
    study.train()
    return [images_per_second(study, trial, pixels, targets, context.pretrained.bf16) for trial in range(trials)]


def _result(
    context: RunContext,
    plan: TrainPlan,
    progress: TrainProgress,
    specs: Mapping[str, TrialSpec],
    rates: Sequence[float | None],
) -> dict[str, Any]:
    tasks = {task.name: task.metadata() for task in plan.tasks}
    choices = [choice_score(best) for best in progress.best]
    trials = {}
    for number, (name, spec) in enumerate(specs.items()):
        scores = {
            task.name: {
                figure: _with_error(value, tasks[task.name] if figure in task.proportion_metrics else None)
                for figure, value in progress.scores[number][task.name].items()
            }
            for task in (plan.tasks[index] for index in spec.task_ids)
        }
        fields = next(iter(scores.values())) if len(plan.tasks) == 1 else {"scores": scores}
        trials[name] = {
            **spec.metadata,
            **fields,
            "best": progress.best[number],
            "skipped_steps": progress.skipped[number],
            "parameters": count_parameters(spec.trial),
            **({} if rates[number] is None else {"images_per_second": rates[number]}),
        }
    pretrained = context.pretrained
    return {
        "encoder": {"format": pretrained.kind, "description": pretrained.description},
        **(next(iter(tasks.values())) if len(tasks) == 1 else {"tasks": tasks}),
        "epochs": round(plan.steps / plan.steps_per_epoch, 3),
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "micro_batch_size": context.micro_batch,
        "trials": trials,
        "chosen": list(specs)[plan.chosen(choices)],
        "selection": plan.selection,
        "training": context.folder.name,
    }


def _with_error(value: Any, counted_over: Mapping[str, Any] | None) -> Any:
    """Return a score as {mean, standard_error}. counted_over: metadata of its task where it is a share of images."""
    if not isinstance(value, float):
        return value
    error = {"standard_error": proportion_stderr(value, counted_over["val_images"])} if counted_over else {}
    return {"mean": value, **error}


def trials_tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return a table of classification: last epoch's accuracy, best epoch, parameters and, if measured, speed."""
    rates = [trial.get("images_per_second") for trial in result["trials"].values()]
    timed = any(rate is not None for rate in rates)
    rows = [
        [
            trial_name(result, name),
            format_percent(trial["top1"]),
            f"{100 * trial['best']['score']:.1f} at {trial['best']['epoch']:.4g}",
            f"{trial['parameters']:,}",
            *(["" if rate is None else f"{rate:,.0f}"] if timed else []),
        ]
        for (name, trial), rate in zip(result["trials"].items(), rates, strict=True)
    ]
    caption = (
        f"'{result['label']}', {result['classes']} classes, {result['train_images']:,} training images, "
        f"{result['epochs']:.4g} epochs; {result['val_images']:,} held-out images; majority class "
        f"{100 * result['chance']:.1f}. {selection_note(result)}"
    )
    title = f"{PROTOCOLS[result['protocol']].title}: accuracy of the last epoch ± standard error"
    columns = ["", "top-1 %", "best", "parameters", *(["images/s"] if timed else [])]
    return [ResultTable(title, columns, rows, caption)]


def format_percent(score: dict[str, float]) -> str:
    return f"{100 * score['mean']:.1f} ±{100 * score['standard_error']:.1f}"


def trial_name(result: dict[str, Any], name: str) -> str:
    """Return a trial's name, with * where it was chosen among several."""
    several = len(result["trials"]) > 1 and result["selection"] != "none"
    return f"{name} *" if name == result["chosen"] and several else name


def selection_note(result: dict[str, Any]) -> str:
    """Return the sentence of a caption that says on which images trial and epoch were chosen."""
    if result["selection"] == "none":
        return "Nothing was chosen: the last epoch is the best."
    chosen = "Best epochs and trial (*) are" if len(result["trials"]) > 1 else "The best epoch is"
    if result["selection"] == "val":
        return f"{chosen} chosen on the same held-out images."
    held = [f"{task['selection_images']:,}" for task in result.get("tasks", {"": result}).values()]
    return f"{chosen} chosen on {' and '.join(held)} training images, which are not trained on."

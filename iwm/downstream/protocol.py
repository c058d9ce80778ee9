"""From a protocol's tasks and arms to its result: train, judge, say what was done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from dali_pipelines.crops import Crops
from iwm.config import ConfigError
from iwm.downstream.bench import Bench, open_task
from iwm.downstream.classification import Column, Task
from iwm.downstream.cost import parameters, training_rate
from iwm.downstream.example import Example, labelled
from iwm.downstream.loop import train
from iwm.downstream.micro_batch import fit, split_of, too_large
from iwm.downstream.mixing import Mixing
from iwm.downstream.plan import Plan, Progress
from iwm.downstream.schedules import Shape, share_of_rate
from iwm.downstream.study import Arm, FrozenEncoders, Study
from iwm.training.signals import StopWish

SAMPLE = 64
"""Most images that an arm's speed is measured with where nothing is compiled."""


@dataclass(frozen=True)
class Made:
    """An arm, on its device, and how it is trained."""

    arm: Arm
    optimizer: torch.optim.Optimizer
    facts: dict[str, Any]
    """What the result says of it: lr, seed, features, predictor, …"""
    solves: tuple[int, ...] = (0,)
    """Numbers of its tasks."""


def run(
    bench: Bench,
    opened: Callable[[Bench], Sequence[Task]],
    made: Mapping[str, Made],
    encoders: FrozenEncoders,
    wish: StopWish,
    *,
    example: Example,
    shape: Shape = "cosine",
    timed: bool = False,
    kept: Sequence[Column] = (),
    to_keep: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Train the arms and judge them. None where `wish` ended the training early.

    opened: opens the tasks, once the micro-batch is known. example: images and targets in training's form, by which
    memory is measured, and speed if `timed`. kept: columns whose frozen features stay on the device. to_keep: what
    best.pt says of how to build the arm. Returns what every protocol's result has: arms, their scores, the chosen one,
    tasks' facts, length. Raises ConfigError where the device has too little memory.
    """
    study = Study(
        {name: each.arm for name, each in made.items()}, encoders, [each.facts["seed"] for each in made.values()]
    )
    study.prepare(bench.here.device, compiled=bench.compiled, attention=bench.pretrained.attention)
    try:
        bench, chosen = fit(bench, study, example, kept)
        plan = _plan(bench, opened, made, study, shape, chosen, to_keep or {})
        progress = train(plan, bench.here, wish, bench.last)
        if progress is None:
            return None
        rates = _rates(bench, study, example if timed else None)
    except torch.OutOfMemoryError as error:
        raise too_large(bench) from error
    return _result(bench, plan, progress, made, rates)


def run_labelled(
    bench: Bench,
    column: Column,
    crops: Crops,
    mixing: Mixing,
    names: Sequence[str],
    made: Mapping[str, Made],
    encoders: FrozenEncoders,
    wish: StopWish,
    *,
    cached: bool = False,
    timed: bool = False,
) -> dict[str, Any] | None:
    """Train arms that classify one column, and judge them, as `run` does.

    names: the column's classes. cached: features of centre crops are computed once, by `encoders`.
    """
    return run(
        bench,
        lambda fitted: [open_task(fitted, column, crops, mixing, encoders if cached else None)],
        made,
        encoders,
        wish,
        example=labelled(bench.pretrained, [len(names)], bench.here.device),
        timed=timed,
        kept=[column] if cached else [],
        to_keep={"classes": names},
    )


def _plan(
    bench: Bench,
    opened: Callable[[Bench], Sequence[Task]],
    made: Mapping[str, Made],
    study: Study,
    shape: Shape,
    chosen: str,
    to_keep: Mapping[str, Any],
) -> Plan:
    """Open the tasks and plan the training. chosen: a line about the micro-batch."""
    s, here = bench.settings, bench.here
    parts = (part for each in made.values() for part in each.arm.modules())
    alone = any(isinstance(part, _BatchNorm) and not isinstance(part, SyncBatchNorm) for part in parts)
    if bench.micro_batch < 2 and alone:
        raise ConfigError(
            "--batch, --micro-batch: a process has one image at once, and batch norm needs at least two to norm by"
        )
    tasks = opened(bench)
    # By images seen: a training is as long on any number of processes and passes.
    per_epoch = tasks[0].images / s.batch
    steps = s.steps or max(1, round(s.epochs * per_epoch))
    warmup = round(steps * s.warmup_epochs / s.epochs)
    return Plan(
        title=f"{bench.name} · {bench.folder}",
        folder=bench.folder,
        identity=bench.identity,
        study=study,
        tasks=tasks,
        solves=[each.solves for each in made.values()],
        optimizers=[each.optimizer for each in made.values()],
        rate=lambda step: share_of_rate(step, steps, warmup, shape),
        steps=steps,
        steps_per_epoch=per_epoch,
        batch=s.batch * len(tasks),
        accumulation=bench.accumulation,
        bf16=bench.pretrained.bf16,
        validate_every=s.validate_every,
        checkpoint_every=s.checkpoint_every,
        log_every=s.log_every,
        tensorboard=s.tensorboard,
        split=split_of(bench),
        opening=[
            f"{bench.name}: {len(made)} arms, {steps:,} steps of {s.batch * len(tasks):,} images, "
            f"{here.size} processes on {here.device.type}",
            chosen,
        ],
        to_keep={
            "protocol": bench.name,
            "settings": bench.identity,
            "facts": {name: each.facts for name, each in made.items()},
            **to_keep,
        },
    )


def _rates(bench: Bench, study: Study, example: Example | None) -> list[float | None]:
    arms = len(study.names)
    if example is None or not bench.here.main:
        return [None] * arms
    # What is compiled is measured with the shapes that it was compiled for.
    pixels, targets = example(bench.micro_batch if bench.compiled else min(bench.micro_batch, SAMPLE))
    study.train()
    return [training_rate(study, arm, pixels, targets, bench.pretrained.bf16) for arm in range(arms)]


def _result(
    bench: Bench, plan: Plan, progress: Progress, made: Mapping[str, Made], rates: Sequence[float | None]
) -> dict[str, Any]:
    tasks = {task.name: task.facts() for task in plan.tasks}
    means = [best["score"] for best in progress.best]
    arms = {}
    for number, (name, each) in enumerate(made.items()):
        scores = {
            task.name: {
                figure: _measured(value, tasks[task.name] if figure in task.counted else None)
                for figure, value in progress.scores[number][task.name].items()
            }
            for task in (plan.tasks[solved] for solved in each.solves)
        }
        alone = next(iter(scores.values())) if len(plan.tasks) == 1 else {"scores": scores}
        arms[name] = {
            **each.facts,
            **alone,
            "best": progress.best[number],
            "skipped_steps": progress.skipped[number],
            "parameters": parameters(each.arm),
            **({} if rates[number] is None else {"images_per_second": rates[number]}),
        }
    pretrained = bench.pretrained
    return {
        "encoder": {"kind": pretrained.kind, "description": pretrained.description},
        **(next(iter(tasks.values())) if len(tasks) == 1 else {"tasks": tasks}),
        "epochs": round(plan.steps / plan.steps_per_epoch, 3),
        "steps": plan.steps,
        "batch": plan.batch,
        "micro_batch": bench.micro_batch,
        "arms": arms,
        "chosen": list(made)[max(plan.whole, key=means.__getitem__)],
        "training": bench.folder.name,
    }


def _measured(value: Any, counted_over: Mapping[str, Any] | None) -> Any:
    """A figure as results have it: where it is a share of the held-out images, with its standard error over them."""
    if not isinstance(value, float):
        return value
    error = {"standard_error": (value * (1 - value) / counted_over["val_images"]) ** 0.5} if counted_over else {}
    return {"mean": value, **error}

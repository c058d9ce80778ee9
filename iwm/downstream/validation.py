"""Evaluation of a study's trials on held-out images, and the choice of the best trial and epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch.nn.modules.batchnorm import _BatchNorm

from iwm.downstream.progress import BEST, Scores, TrainPlan, TrainProgress, choice_score, save_state
from iwm.downstream.study import Evaluated
from iwm.training.distributed import DistEnv
from iwm.training.metrics import MetricLogger


def scores_of_trials(plan: TrainPlan, dist: DistEnv, images: Evaluated = "val") -> Scores:
    """Return all trials' scores on held-out images."""
    study = plan.study.eval()
    if dist.size > 1:
        # Each process has its own running means since the last broadcast; those of rank 0 are saved.
        for part in study.trials.modules():
            if isinstance(part, _BatchNorm):
                for buffer in part.buffers():
                    torch.distributed.broadcast(buffer, src=0)
    scores: Scores = [{} for _ in study.names]
    for task_index, task in enumerate(plan.tasks):
        trials = [trial for trial, task_ids in enumerate(plan.task_ids) if task_index in task_ids]
        with torch.autocast(dist.device.type, torch.bfloat16, enabled=plan.bf16):
            metrics = task.evaluate(study, task_index, trials, images)
        for trial, values in zip(trials, metrics, strict=True):
            scores[trial][task.name] = values
    study.train()
    return scores


def validate(plan: TrainPlan, progress: TrainProgress, monitor: MetricLogger, dist: DistEnv) -> None:
    """Evaluate all trials, update their best epochs, and save best.pt if the best trial improved.

    Where there is nothing to choose, the last epoch is the best, and best.pt has the first trial's.
    """
    progress.scores = scores_of_trials(plan, dist)
    means, epoch = _means(plan, progress.scores), progress.step / plan.steps_per_epoch
    current = [{"score": mean, "epoch": epoch} for mean in means]
    if plan.selection == "train":
        chosen_by = _means(plan, scores_of_trials(plan, dist, "selection"))
        current = [{**now, "selection": mean} for now, mean in zip(current, chosen_by, strict=True)]
    choices = [choice_score(now) for now in current]
    leader = plan.chosen(choices)
    if plan.selection == "none":
        progress.best, improved = current, progress.step == plan.steps
    else:
        before = max((choice_score(progress.best[trial]) for trial in plan.full_trials if progress.best), default=-1.0)
        progress.best = [max(pair, key=choice_score) for pair in zip(progress.best or current, current, strict=True)]
        improved = choices[leader] > before
    if dist.is_main and improved:
        save_state(
            plan.folder,
            BEST,
            {
                **plan.best_metadata,
                "trial": plan.study.names[leader],
                "epoch": epoch,
                "scores": progress.scores[leader],
                "tasks": {task.name: task.metadata() for task in plan.tasks},
                "state": plan.study.trials[leader].state_dict(),
            },
        )
    main = plan.tasks[0].metric
    logged = _named(main, plan, means, leader)
    if plan.selection == "train":
        logged |= _named(f"selection/{main}", plan, choices, leader)
    monitor.log(progress.step, logged)


def _means(plan: TrainPlan, scores: Scores) -> list[float]:
    """Return each trial's mean over its tasks, of the metric that is chosen by."""
    metric_of = {task.name: task.metric for task in plan.tasks}
    return [sum(figures[metric_of[task]] for task, figures in trial.items()) / len(trial) for trial in scores]


def _named(metric: str, plan: TrainPlan, means: Sequence[float], leader: int) -> dict[str, float]:
    """Return the leading trial's mean as a metric and, where there are several trials, the mean of each."""
    per_trial = {f"{metric}/{name}": mean for name, mean in zip(plan.study.names, means, strict=True)}
    return {metric: means[leader], **(per_trial if len(means) > 1 else {})}

"""Training loop of a study's trials, with evaluation and checkpoints."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from iwm.downstream.optim import set_lr
from iwm.downstream.progress import LAST, TrainPlan, TrainProgress, save_state
from iwm.downstream.study import Study
from iwm.downstream.validation import scores_of_trials, validate
from iwm.training.checkpoint_writer import CheckpointWriter
from iwm.training.distributed import DistEnv, StopConsensus
from iwm.training.loggers import open_files
from iwm.training.metric_window import MetricQueue, MetricWindow, WindowMetrics
from iwm.training.metrics import MetricLogger, memory_gib
from iwm.training.optim import step_if_finite
from iwm.training.parallel import gradient_norm, replicate
from iwm.training.rank_clock import RankClock
from iwm.training.rank_progress import Phase
from iwm.training.runtime import StopFlag, manual_gc
from iwm.training.step import StepResult


def train(plan: TrainPlan, dist: DistEnv, stop: StopFlag, last: dict[str, Any] | None) -> TrainProgress | None:
    """Train to the end. Return None where `stop` ended it early; last.pt then has the state to resume from.

    last: content of last.pt to resume from (progress.load_last). The best epoch of the best trial is saved in best.pt.
    Raises OSError where best.pt, or last.pt at the end, cannot be written. The previous last.pt then stays unchanged,
    and the same command resumes from it.
    """
    study, device = plan.study.train(), dist.device
    trials = len(study.names)
    progress = TrainProgress(skipped=[0] * trials)
    if last is not None:
        progress = _restore(plan, last)
    modules = _parallelized(study, dist)
    evaluate_every = max(1, round(plan.validate_every * plan.steps_per_epoch))
    consensus, clock = StopConsensus(dist), RankClock(dist, modules[0])
    if dist.is_main:
        plan.folder.mkdir(parents=True, exist_ok=True)
    loggers = open_files(plan.folder, progress.step, tensorboard=plan.tensorboard) if dist.is_main else []
    with (
        manual_gc(),
        MetricLogger(plan.title, plan.steps, progress.step, main=dist.is_main, loggers=loggers) as monitor,
        MetricQueue() as queue,
        _checkpoint_writer(plan, monitor, dist) as writer,
    ):
        for line in plan.startup_messages:
            monitor.print(line)
        window, stopped = MetricWindow(device), False
        while progress.step < plan.steps and not stopped:
            share = plan.lr_factor(progress.step)
            clock.start()
            for optimizer in plan.optimizers:
                set_lr(optimizer, share)
                optimizer.zero_grad(set_to_none=True)
            losses, norm_buffers = torch.zeros(trials, device=device), _norm_buffers(study)
            for part in range(plan.accumulation):
                losses += _pass(plan, modules, progress.step * plan.accumulation + part, dist, window)
            window.results.append(StepResult(losses, *_step(plan, norm_buffers)))
            progress.step += 1
            dist.progress.complete_step(progress.step)
            monitor.set_step(progress.step)
            stopped = consensus.any_rank_stopped(bool(stop))
            ended = progress.step == plan.steps or stopped
            evaluating = progress.step % evaluate_every == 0 or progress.step == plan.steps
            saving = progress.step % plan.checkpoint_every == 0 or ended

            # A window ends at every evaluation and every last.pt, so that neither loses a part of it.
            if progress.step % plan.log_every == 0 or evaluating or saving:
                write = _writer(plan, progress, monitor, share, window)
                queue.append(window.end(dist, plan.batch_size, clock), write)
                window = MetricWindow(device)
                gc.collect()
            queue.write_ready()
            writer.poll()
            if evaluating or saving:
                queue.write_all()
            if evaluating:
                dist.progress.enter(Phase.VALIDATING)
                validate(plan, progress, monitor, dist)
                window = MetricWindow(device)
            if saving:
                dist.progress.enter(Phase.SAVING)
                window.checkpoint_pause = writer.save(partial(_state, plan, progress))
        if (failure := writer.finish()) is not None:
            raise failure
        if stopped and progress.step < plan.steps:
            monitor.print(f"stopped by a signal after step {progress.step:,}; rerun the same command to resume")
            return None
    if not progress.scores:
        # The training had ended before, so this process has not evaluated it yet.
        progress.scores = scores_of_trials(plan, dist)
    return progress


def _parallelized(study: Study, dist: DistEnv) -> list[nn.Module]:
    """Return the module to call for each trial: the trial itself, or DDP around it.

    Each trial has its own reducer, so that its gradients are averaged in its own backward pass.
    """
    if dist.size == 1:
        return list(study.trials)

    def wrap(trial: nn.Module) -> nn.Module:
        if not any(parameter.requires_grad for parameter in trial.parameters()):
            return trial  # DDP refuses a module without gradients
        # Only the running means of batch norm change; all other buffers are constants.
        return replicate(trial, dist, sync_buffers=any(isinstance(part, _BatchNorm) for part in trial.modules()))

    return [wrap(trial) for trial in study.trials]


def _pass(
    plan: TrainPlan, modules: Sequence[nn.Module], pass_index: int, dist: DistEnv, window: MetricWindow
) -> Float[Tensor, " a"]:
    """Add the gradients of a pass, one trial after the other; return each trial's loss divided by the accumulation.

    A trial's graph is freed before the next one is built, so the peak memory is that of the largest trial.
    """
    dist.progress.enter(Phase.WAITING)
    start = time.perf_counter()
    batches = [task.get_batch(pass_index) for task in plan.tasks]
    window.waited += time.perf_counter() - start
    dist.progress.enter(Phase.TRAINING)
    inputs = [inputs for inputs, _ in batches]
    joint = inputs[0] if len(inputs) == 1 else _concatenate(inputs)
    targets = [targets for _, targets in batches]
    accumulating = (pass_index + 1) % plan.accumulation != 0
    autocast = partial(torch.autocast, dist.device.type, torch.bfloat16, enabled=plan.bf16)
    with autocast():
        shared = plan.study.shared_inputs(joint)
    losses = []
    for trial, module in enumerate(modules):
        plan.study.seed(trial, pass_index, dist.rank)
        with module.no_sync() if accumulating and isinstance(module, DistributedDataParallel) else nullcontext():
            # One context per trial: leaving it frees the casts of the trial's weights.
            with autocast():
                loss = module(shared, targets).float() / plan.accumulation
            if loss.requires_grad:
                loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses)


def _concatenate(inputs: Sequence[Any]) -> Any:
    """Concatenate the inputs of several tasks."""
    if isinstance(inputs[0], Tensor):
        return torch.cat(list(inputs))
    return {name: torch.cat([of_task[name] for of_task in inputs]) for name in inputs[0]}


NormBuffers = list[list[tuple[Tensor, Tensor]]]
"""Buffers of each trial's batch norms, with copies of their values before the step."""


def _norm_buffers(study: Study) -> NormBuffers:
    return [
        [
            (buffer, buffer.clone())
            for part in trial.modules()
            if isinstance(part, _BatchNorm)
            for buffer in part.buffers()
        ]
        for trial in study.trials
    ]


def _step(plan: TrainPlan, norm_buffers: NormBuffers) -> tuple[Tensor, Tensor]:
    """Step every trial with a finite gradient; return gradient norms and flags of skipped trials, on the device.

    A skipped step also restores the batch norms' buffers, because an infinite value would stay in a running mean.
    """
    norms, skipped = [], []
    for trial, optimizer, buffers in zip(plan.study.trials, plan.optimizers, norm_buffers, strict=True):
        norms.append(gradient_norm(trial.parameters()))
        skipped.append(~torch.isfinite(norms[-1]))
        step_if_finite(optimizer, skipped[-1])
        for buffer, before in buffers:
            buffer.copy_(torch.where(skipped[-1], before, buffer))
    return torch.stack(norms), torch.stack(skipped)


def _writer(
    plan: TrainPlan, progress: TrainProgress, monitor: MetricLogger, lr_factor: float, window: MetricWindow
) -> Callable[[WindowMetrics], None]:
    """Return the function that writes the line of a window which ends now, at the current step."""
    step, memory, pause = progress.step, memory_gib(window.device), window.checkpoint_pause

    def write(totals: WindowMetrics) -> None:
        for trial, count in enumerate(totals.skipped.sum(dim=0).tolist()):
            progress.skipped[trial] += count
        if totals.straggler is not None:
            monitor.print(totals.straggler)
        metrics = _mean_losses(plan.study.names, totals.loss) | totals.speed
        rest = {"lr_factor": lr_factor, "epoch": step / plan.steps_per_epoch, "memory_gib": memory}
        if pause is not None:
            rest["checkpoint_pause"] = pause.seconds()
        monitor.log(step, metrics | rest | {"skipped": sum(progress.skipped)})

    return write


def _mean_losses(names: Sequence[str], losses: Float[Tensor, "steps a"]) -> dict[str, float]:
    """Return the mean loss over trials and, where there are several, the loss of each trial."""
    means = losses.mean(dim=0).tolist()
    per_trial = {f"loss/{name}": mean for name, mean in zip(names, means, strict=True)} if len(names) > 1 else {}
    return {"loss": sum(means) / len(means), **per_trial}


def _checkpoint_writer(plan: TrainPlan, monitor: MetricLogger, dist: DistEnv) -> CheckpointWriter:
    """Return the writer of last.pt. A failure before the end is a warning."""

    def write(content: dict[str, Any], ranks: list[Any]) -> None:
        save_state(plan.folder, LAST, {**content, "ranks": ranks})

    def warn(error: OSError) -> None:
        monitor.print(f"WARNING: {error}. Free some space; the next checkpoint will be written as planned")

    return CheckpointWriter(dist, write, warn)


def _state(plan: TrainPlan, progress: TrainProgress) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of last.pt without `ranks`, and this process's entry of `ranks`."""
    content = {
        "identity": plan.identity,
        "micro_batch_state": plan.micro_batch_state,
        "progress": vars(progress),
        "trials": plan.study.state_dicts(),
        "optimizers": [optimizer.state_dict() for optimizer in plan.optimizers],
    }
    return content, {"tasks": [task.state() for task in plan.tasks]}


def _restore(plan: TrainPlan, last: dict[str, Any]) -> TrainProgress:
    """Load the state of last.pt; return its progress."""
    plan.study.trials.load_state_dict(last["trials"], strict=True)
    for optimizer, saved in zip(plan.optimizers, last["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    progress = TrainProgress(**{**last["progress"], "scores": []})
    plan.startup_messages.append(f"resuming from step {progress.step:,}")
    return progress

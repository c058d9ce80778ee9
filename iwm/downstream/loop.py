"""Training of a study's arms from the first step to the last, and judging them on the way, read top to bottom."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from iwm.downstream import state
from iwm.downstream.optim import set_rate, step_unless
from iwm.downstream.plan import Plan, Progress, Scores
from iwm.downstream.study import Study
from iwm.downstream.window import Window
from iwm.training.distributed import StopAgreement, World
from iwm.training.loop import collecting_by_hand
from iwm.training.monitor import Monitor, memory_gib, rewind
from iwm.training.parallel import gradient_norm, replicate
from iwm.training.signals import StopWish


def train(plan: Plan, here: World, wish: StopWish, last: dict[str, Any] | None) -> Progress | None:
    """Train to the end, from `last` (state.read_last) if there is one. None where `wish` ended it early: then last.pt
    has what is needed to go on.

    The best epoch of the best arm is kept in best.pt. Raises OSError where that, or last.pt at an end, cannot be
    written; then too last.pt is what it was, and the same command goes on from it.
    """
    study, device = plan.study.train(), here.device
    arms = len(study.names)
    progress = Progress(skipped=[0] * arms)
    if last is not None:
        progress = _restore(plan, last)
    wrapped = _wrapped(study, here)
    every = max(1, round(plan.validate_every * plan.steps_per_epoch))
    agreement, window = StopAgreement(here), Window(arms)
    if here.main:
        plan.folder.mkdir(parents=True, exist_ok=True)
        rewind(plan.folder, progress.step)
    with (
        collecting_by_hand(),
        Monitor(
            plan.folder, plan.title, plan.steps, progress.step, main=here.main, tensorboard=plan.tensorboard
        ) as monitor,
    ):
        for line in plan.opening:
            monitor.say(line)
        stopped = False
        while progress.step < plan.steps and not stopped:
            share = plan.rate(progress.step)
            for optimizer in plan.optimizers:
                set_rate(optimizer, share)
                optimizer.zero_grad(set_to_none=True)
            losses, means = torch.zeros(arms, device=device), _running_means(study)
            for part in range(plan.accumulation):
                losses += _pass(plan, wrapped, progress.step * plan.accumulation + part, here, window)
            window.add(losses, _step(plan, means))
            progress.step += 1
            monitor.advance(progress.step)
            stopped = agreement.agreed(bool(wish))
            ended = progress.step == plan.steps or stopped
            judging = progress.step % every == 0 or progress.step == plan.steps
            saving = progress.step % plan.checkpoint_every == 0 or ended

            # A window ends with every look and every last.pt, so that none of it is lost by either.
            if progress.step % plan.log_every == 0 or judging or saving:
                for arm, count in enumerate(window.skipped()):
                    progress.skipped[arm] += count
                metrics = window.read(study.names, here, plan.batch)
                epoch = progress.step / plan.steps_per_epoch
                rest = {"rate": share, "epoch": epoch, "memory_gib": memory_gib(device)}
                monitor.write(progress.step, metrics | rest | {"skipped": sum(progress.skipped)})
                gc.collect()
                window = Window(arms)
            if judging:
                _judge(plan, progress, monitor, here)
                window = Window(arms)
            if saving:
                _save(plan, progress, monitor, here, must=ended)
        if stopped and progress.step < plan.steps:
            monitor.say(f"stopped by a signal after step {progress.step:,}; the same command goes on from there")
            return None
    if not progress.scores:
        # It was at its end before: this process has not looked at the held-out images.
        progress.scores = _scores(plan, here)
    return progress


def _wrapped(study: Study, here: World) -> list[nn.Module]:
    """Return what is called of each arm: the arm itself, or DDP around it.

    Each arm has a reducer of its own, so that its gradients are averaged in its own backward pass.
    """
    if here.size == 1:
        return list(study.arms)

    def wrapped(arm: nn.Module) -> nn.Module:
        if not any(parameter.requires_grad for parameter in arm.parameters()):
            return arm  # DDP refuses a module without gradients
        # Buffers are constants, but for the running means of batch norm.
        return replicate(arm, here, sync_buffers=any(isinstance(part, _BatchNorm) for part in arm.modules()))

    return [wrapped(arm) for arm in study.arms]


def _pass(plan: Plan, wrapped: Sequence[nn.Module], number: int, here: World, window: Window) -> Float[Tensor, " a"]:
    """Add a pass's gradients, arm by arm; return each arm's loss, as a share of the step's.

    An arm's graph is freed before the next arm's is made, so the peak is the largest arm's and not their sum.
    """
    waiting = time.perf_counter()
    batches = [task.batch(number) for task in plan.tasks]
    window.waited += time.perf_counter() - waiting
    inputs = [inputs for inputs, _ in batches]
    together = inputs[0] if len(inputs) == 1 else _joined(inputs)
    targets = [targets for _, targets in batches]
    more = (number + 1) % plan.accumulation != 0
    autocast = partial(torch.autocast, here.device.type, torch.bfloat16, enabled=plan.bf16)
    with autocast():
        shared = plan.study.share(together)
    losses = []
    for arm, module in enumerate(wrapped):
        plan.study.seed(arm, number, here.rank)
        with module.no_sync() if more and isinstance(module, DistributedDataParallel) else nullcontext():
            # One context for each arm: leaving it drops the casts of this arm's weights.
            with autocast():
                loss = module(shared, targets).float() / plan.accumulation
            if loss.requires_grad:
                loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses)


def _joined(inputs: Sequence[Any]) -> Any:
    """The inputs of several tasks, one after the other."""
    if isinstance(inputs[0], Tensor):
        return torch.cat(list(inputs))
    return {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}


Means = list[list[tuple[Tensor, Tensor]]]
"""Of each arm: buffers of its batch norms, and copies of what they were."""


def _running_means(study: Study) -> Means:
    return [
        [
            (buffer, buffer.clone())
            for part in arm.modules()
            if isinstance(part, _BatchNorm)
            for buffer in part.buffers()
        ]
        for arm in study.arms
    ]


def _step(plan: Plan, means: Means) -> Tensor:
    """A step of every arm whose gradient is finite; which were not, on the device.

    Where it is not, batch norms too forget what they saw: one infinite image would stay in a running mean for ever.
    """
    broken = []
    for arm, optimizer, norms in zip(plan.study.arms, plan.optimizers, means, strict=True):
        broken.append(~torch.isfinite(gradient_norm(arm.parameters())))
        step_unless(optimizer, broken[-1])
        for buffer, before in norms:
            buffer.copy_(torch.where(broken[-1], before, buffer))
    return torch.stack(broken)


def _scores(plan: Plan, here: World) -> Scores:
    study = plan.study.eval()
    if here.size > 1:
        # Since the last broadcast each process has its own running means; those that are kept are the first one's.
        for part in study.arms.modules():
            if isinstance(part, _BatchNorm):
                for buffer in part.buffers():
                    dist.broadcast(buffer, src=0)
    scores: Scores = [{} for _ in study.names]
    for number, task in enumerate(plan.tasks):
        arms = [arm for arm, solves in enumerate(plan.solves) if number in solves]
        with torch.autocast(here.device.type, torch.bfloat16, enabled=plan.bf16):
            judged = task.judge(study, number, arms)
        for arm, figures in zip(arms, judged, strict=True):
            scores[arm][task.name] = figures
    study.train()
    return scores


def _judge(plan: Plan, progress: Progress, monitor: Monitor, here: World) -> None:
    """Look at the held-out images; remember what is best of each arm, and keep the best arm at its best."""
    progress.scores = _scores(plan, here)
    metric_of = {task.name: task.metric for task in plan.tasks}
    means = [sum(figures[metric_of[task]] for task, figures in arm.items()) / len(arm) for arm in progress.scores]
    epoch = progress.step / plan.steps_per_epoch
    before = max((progress.best[arm]["score"] for arm in plan.whole), default=-1.0) if progress.best else -1.0
    reached = [{"score": mean, "epoch": epoch} for mean in means]
    progress.best = [
        max(pair, key=lambda best: best["score"]) for pair in zip(progress.best or reached, reached, strict=True)
    ]
    leader = max(plan.whole, key=means.__getitem__)
    if here.main and means[leader] > before:
        state.write(
            plan.folder,
            state.BEST,
            {
                **plan.to_keep,
                "arm": plan.study.names[leader],
                "epoch": epoch,
                "scores": progress.scores[leader],
                "tasks": {task.name: task.facts() for task in plan.tasks},
                "state": plan.study.arms[leader].state_dict(),
            },
        )
    main = plan.tasks[0].metric
    each = {f"{main}/{name}": mean for name, mean in zip(plan.study.names, means, strict=True)}
    monitor.write(progress.step, {main: means[leader], **(each if len(means) > 1 else {})})


def _save(plan: Plan, progress: Progress, monitor: Monitor, here: World, must: bool) -> None:
    """Write last.pt. On the way a failure is said and costs nothing that was saved before; where it `must` be written,
    at an end, it raises OSError."""
    ranks = here.gather({"tasks": [task.state() for task in plan.tasks]})
    if not here.main:
        return
    content = {
        "identity": plan.identity,
        "split": plan.split,
        "progress": vars(progress),
        "arms": plan.study.trained(),
        "optimizers": [optimizer.state_dict() for optimizer in plan.optimizers],
        "ranks": ranks,
    }
    try:
        state.write(plan.folder, state.LAST, content)
    except OSError as error:
        if must:
            raise
        monitor.say(f"WARNING: {error}. Free some space: the next is tried as planned")


def _restore(plan: Plan, last: dict[str, Any]) -> Progress:
    plan.study.arms.load_state_dict(last["arms"], strict=True)
    for optimizer, saved in zip(plan.optimizers, last["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    progress = Progress(**{**last["progress"], "scores": []})
    plan.opening.append(f"going on from step {progress.step:,}")
    return progress

"""Pretraining from its first step to its last, read top to bottom (paper, A.1)."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dali_pipelines.outputs import SampleKeys
from iwm.config import to_yaml
from iwm.flops import measured_peak, training_flops
from iwm.training import checkpoint as checkpoints
from iwm.training.distributed import StopAgreement, World
from iwm.training.health import health, held_out
from iwm.training.monitor import Monitor, memory_gib, rewind
from iwm.training.session import Session, checkpoint_of
from iwm.training.signals import StopWish
from iwm.training.step import StepResult, masks_for, train_step
from shards.atomic import write_atomically


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says why and what to look at."""


def pretrain(session: Session, wish: StopWish) -> None:
    """Train until the configured end or until `wish`, then save.

    Raises TrainingError where the gradient stays non-finite, or the last checkpoint cannot be written.
    """
    s, config, here = session, session.config, session.here
    if here.main:
        write_atomically(s.run / "config.yaml", to_yaml(config).encode())
        rewind(s.run, s.step)
    watched = held_out(config, here)
    flops_share = training_flops(config).total / measured_peak(here.device, config.train.precision) / here.size
    agreement, streak = StopAgreement(here), 0
    with (
        collecting_by_hand(),
        Monitor(
            s.run, f"iwm · {s.run}", s.schedules.steps, s.step, main=here.main, tensorboard=config.log.tensorboard
        ) as monitor,
    ):
        for line in s.opening:
            monitor.say(line)
        window, ended, saved = Window(), s.step >= s.schedules.steps, True
        while not ended:
            values = s.schedules.at(s.step)
            waiting = time.perf_counter()
            batches = [next(s.loader) for _ in range(s.accumulation)]
            window.waited += time.perf_counter() - waiting
            masks = [masks_for(config, here, s.step, part, s.micro_batch) for part in range(s.accumulation)]
            window.results.append(train_step(s.model, s.gradient, s.optimizer, batches, masks, values))
            window.keys.append([batch.keys for batch in batches])
            s.step += 1
            s.samples += config.data.batch
            monitor.advance(s.step)
            ended = agreement.agreed(bool(wish)) or s.step == s.schedules.steps

            if s.step % config.log.every == 0 or ended:
                metrics, flags = window.read(here, config.data.batch)
                s.skipped += sum(flags)
                streak = _streak(flags, streak, config.train.nonfinite_limit, window)
                monitor.write(
                    s.step,
                    {
                        **metrics,
                        "mfu": metrics["images_per_second"] * flops_share,
                        "lr": values.lr,
                        "weight_decay": values.weight_decay,
                        "ema": values.ema,
                        "samples": s.samples,
                        "epoch": s.samples / s.loader.samples_per_epoch,
                        "skipped": s.skipped,
                        "memory_gib": memory_gib(here.device),
                    },
                )
                gc.collect()
                window = Window()
            if watched is not None and (s.step % config.log.health_every == 0 or s.step == s.schedules.steps):
                monitor.write(s.step, health(s.model, watched))
                window = Window()
            if s.step % config.log.checkpoint_every == 0 or ended:
                saved = _save(s, monitor)
        if s.step < s.schedules.steps:
            monitor.say(f"stopped by a signal after step {s.step:,}; the same command goes on from there")
    if not saved:
        raise TrainingError(f"{s.run}: the last checkpoint could not be written; free some space and run this again")


@contextmanager
def collecting_by_hand() -> Iterator[None]:
    """Garbage is collected with the metrics alone, so that no process pauses while the others wait for it. What is
    there before the first step is left out: looking through it takes hundreds of milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@dataclass
class Window:
    """What has happened since metrics were last written. Its scalars lie on the device until `read`."""

    results: list[StepResult] = field(default_factory=list)
    keys: list[list[SampleKeys]] = field(default_factory=list)
    """Of each step's batches; looked up only if a step was skipped."""
    waited: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def read(self, here: World, batch: int) -> tuple[dict[str, float], list[bool]]:
        """Metrics of the window, and of each step whether it was skipped. Waits for the device."""
        loss = torch.stack([result.loss for result in self.results])
        skipped = torch.stack([result.skipped for result in self.results])
        loss = here.mean(loss)[~skipped].mean()
        norm = torch.stack([result.gradient_norm for result in self.results])[~skipped].mean()
        flags = skipped.tolist()
        seconds = time.perf_counter() - self.began
        return {
            "loss": loss.item(),
            "gradient_norm": norm.item(),
            "images_per_second": len(self.results) * batch / seconds,
            "data_wait": self.waited / seconds,
        }, flags


def _streak(flags: list[bool], before: int, limit: int, window: Window) -> int:
    """Skipped steps in a row up to now; TrainingError, naming the last one's samples, where there are too many."""
    streak = before
    for flag, keys in zip(flags, window.keys, strict=True):
        streak = streak + 1 if flag else 0
        if streak >= limit:
            samples = ", ".join(key for part in keys for key in part)
            raise TrainingError(
                f"the gradient was not finite in {streak} steps in a row; nothing was learnt in them and the last "
                f"checkpoint is good. Lower --optim.lr or set --optim.clip. Samples of the last of them: {samples}"
            )
    return streak


def _save(session: Session, monitor: Monitor) -> bool:
    """Write a checkpoint; a failure is said and costs nothing that was saved before. Whether it was written."""
    content = checkpoint_of(session)
    if not session.here.main:
        return True
    try:
        checkpoints.save(session.run, content)
    except OSError as error:
        monitor.say(f"WARNING: {error}. Free some space: the next checkpoint is tried as planned")
        return False
    checkpoints.prune(session.run, session.config.log.keep, session.config.log.milestone_every)
    return True

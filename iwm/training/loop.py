"""The pretraining loop (paper, A.1)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from iwm.config_io import to_yaml
from iwm.models.flops import measure_matmul_flops, training_flops
from iwm.models.world_model import WorldModel
from iwm.training import checkpoint as checkpoints
from iwm.training.checkpoint import Checkpoint
from iwm.training.checkpoint_writer import CheckpointWriter
from iwm.training.distributed import StopConsensus
from iwm.training.loggers import open_loggers
from iwm.training.metric_window import MetricQueue, MetricWindow, WindowMetrics
from iwm.training.metrics import MetricLogger, memory_gib
from iwm.training.optim import ScheduleValues
from iwm.training.rank_clock import RankClock
from iwm.training.rank_progress import Phase
from iwm.training.run_record import RunRecord
from iwm.training.runtime import StopFlag, manual_gc
from iwm.training.step import prepare_masks, train_step
from iwm.training.train_state import TrainState, checkpoint_parts, checkpoint_tensors
from shards.atomic import write_atomically
from shards.errors import UserError


class TrainingError(UserError):
    """Training that cannot continue; the message names the cause and the remedy."""


def pretrain(
    state: TrainState, stop: StopFlag, validate: Callable[[WorldModel], dict[str, float]] | None = None
) -> None:
    """Train until the configured end or until `stop` is set, then save a checkpoint.

    validate: returns metrics of the model, logged every log.eval_interval steps, and before the first step of a run
    that starts from known weights; None: no validation.
    Raises TrainingError where the gradient stays non-finite, or the last checkpoint cannot be written.
    """
    s, config, dist = state, state.config, state.dist
    if dist.is_main:
        write_atomically(s.run / "config.yaml", to_yaml(config).encode())
    flops_share = training_flops(config).total / measure_matmul_flops(dist.device, config.train.precision) / dist.size
    agreement, clock = StopConsensus(dist), RankClock(dist, s.forward_backward.wrapped)
    # Rank 0 validates alone, but all processes end a window before it.
    validating = any(dist.all_gather(validate is not None))
    # A finished run records and logs nothing.
    is_active = dist.is_main and s.step < s.schedules.steps
    record = _start_record(s) if is_active else None
    loggers = open_loggers(config, s.run, s.step) if is_active else []
    with (
        manual_gc(),
        MetricLogger(f"iwm · {s.run}", s.schedules.steps, s.step, main=dist.is_main, loggers=loggers) as monitor,
        MetricQueue() as queue,
        _checkpoint_writer(s, monitor, record) as writer,
    ):
        for line in s.startup_messages:
            monitor.print(line)
        if s.step == 0 and config.init_from is not None and validate is not None:
            monitor.log(0, validate(s.model))
        lines = _MetricLines(s, monitor, flops_share)
        window, ended = MetricWindow(dist.device), s.step >= s.schedules.steps
        if not ended:
            writer.reserve(checkpoint_tensors(s))
        while not ended:
            values = s.schedules.values_at(s.step)
            dist.progress.enter(Phase.WAITING)
            clock.start()
            waiting = time.perf_counter()
            batches = [next(s.loader) for _ in range(s.accumulation)]
            window.waited += time.perf_counter() - waiting
            dist.progress.enter(Phase.TRAINING)
            masks = [prepare_masks(config, dist, s.step, part, s.micro_batch) for part in range(s.accumulation)]
            window.results.append(train_step(s.model, s.forward_backward, s.optimizer, batches, masks, values))
            window.keys.append([batch.keys for batch in batches])
            s.step += 1
            s.samples += config.data.global_batch_size
            dist.progress.complete_step(s.step)
            monitor.set_step(s.step)
            # The processes may see the same error after different steps, but stop after the same one.
            failed = lines.error is not None
            ended = agreement.any_rank_stopped(bool(stop) or failed) or s.step == s.schedules.steps
            due = validating and (s.step % config.log.eval_interval == 0 or s.step == s.schedules.steps)
            saving = s.step % config.log.checkpoint_interval == 0 or ended

            # A window ends at every validation and every checkpoint, so that neither loses a part of it.
            if s.step % config.log.interval == 0 or due or saving:
                queue.append(window.end(dist, config.data.global_batch_size, clock), lines.writer(window, values))
                window = MetricWindow(dist.device)
                gc.collect()
            queue.write_ready()
            writer.poll()
            if due or saving:
                queue.write_all()
                lines.raise_error()
            if due:
                dist.progress.enter(Phase.VALIDATING)
                if validate is not None:
                    monitor.log(s.step, validate(s.model))
                window = MetricWindow(dist.device)
            if saving:
                dist.progress.enter(Phase.SAVING)
                window.checkpoint_pause = writer.save(partial(checkpoint_parts, s))
        if (failure := writer.finish()) is not None:
            _warn(monitor, failure)
        if s.step < s.schedules.steps:
            monitor.print(f"stopped by a signal after step {s.step:,}; rerun the same command to resume")
        dist.progress.enter(Phase.ENDING)
    if failure is not None:
        raise TrainingError(
            f"{s.run}: the last checkpoint could not be written; free disk space and rerun the same command"
        )


class _MetricLines:
    """Lines of metrics.jsonl, one per window, and the number of consecutive skipped steps up to the last line."""

    error: TrainingError | None = None
    """Error that must end the training, found in a window's metrics. Later windows write no line."""

    def __init__(self, state: TrainState, monitor: MetricLogger, flops_share: float) -> None:
        """Store the arguments. flops_share: MFU of training one image per second."""
        self._state, self._monitor, self._flops_share = state, monitor, flops_share
        self._streak = 0

    def writer(self, window: MetricWindow, values: ScheduleValues) -> Callable[[WindowMetrics], None]:
        """Return the function that writes the line of a window which ends now, at the current step.

        values: hyperparameters of the window's last step.
        """
        s = self._state
        step, samples, memory = s.step, s.samples, memory_gib(s.dist.device)
        pause = window.checkpoint_pause
        staged = s.loader.cache.staged_share() if s.loader.cache else None

        def write(metrics: WindowMetrics) -> None:
            flags = metrics.skipped.tolist()
            s.skipped += sum(flags)
            self._count(flags, window)
            if self.error is not None:
                return
            if metrics.straggler is not None:
                self._monitor.print(metrics.straggler)
            self._monitor.log(
                step,
                {
                    "loss": metrics.loss[~metrics.skipped].mean().item(),
                    "gradient_norm": metrics.gradient_norm[~metrics.skipped].mean().item(),
                    **metrics.speed,
                    "mfu": metrics.speed["images_per_second"] * self._flops_share,
                    "lr": values.lr,
                    "weight_decay": values.weight_decay,
                    "ema": values.ema,
                    "samples": samples,
                    "epoch": samples / s.loader.samples_per_epoch,
                    "skipped": s.skipped,
                    "memory_gib": memory,
                    **({"staged": staged} if staged is not None else {}),
                    **({"checkpoint_pause": pause.seconds()} if pause is not None else {}),
                },
            )

        return write

    def _count(self, flags: list[bool], window: MetricWindow) -> None:
        """Count the consecutive skipped steps; where they reach max_nonfinite_steps, set `error`.

        It names the samples of the last of them.
        """
        for flag, keys in zip(flags, window.keys, strict=True):
            self._streak = self._streak + 1 if flag else 0
            if self.error is None and self._streak >= self._state.config.train.max_nonfinite_steps:
                samples = ", ".join(key for part in keys for key in part)
                self.error = TrainingError(
                    f"the gradient was not finite in {self._streak} steps in a row; they were skipped, and the last "
                    "checkpoint is valid. Lower --optim.lr, set --optim.grad-clip, or check the samples of the last "
                    f"step: {samples}"
                )

    def raise_error(self) -> None:
        """Raise `error` if it is set."""
        if self.error is not None:
            raise self.error


def _start_record(state: TrainState) -> RunRecord:
    parts: dict[str, nn.Module] = {"encoder": state.model.encoder, "predictor": state.model.predictor}
    return RunRecord(
        state.run,
        step=state.step,
        device=state.dist.device,
        processes=state.dist.size,
        images=state.loader.samples_per_epoch,
        parameters={name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
    )


def _checkpoint_writer(state: TrainState, monitor: MetricLogger, record: RunRecord | None) -> CheckpointWriter:
    """Return the writer of checkpoints, which also updates the run's record and deletes old checkpoints.

    record: None on processes other than the main one, which write nothing.
    """
    log = state.config.log

    def write(content: dict[str, Any], loaders: list[Any]) -> None:
        checkpoint = Checkpoint.gathered(content, loaders)
        checkpoints.save_checkpoint(state.run, checkpoint)
        if record is not None:
            record.update(checkpoint.step)
        checkpoints.prune_checkpoints(state.run, log.keep_last_k, log.keep_every)

    return CheckpointWriter(state.dist, write, lambda error: _warn(monitor, error))


def _warn(monitor: MetricLogger, error: OSError) -> None:
    monitor.print(f"WARNING: {error}. Free disk space; training continues to the next checkpoint")

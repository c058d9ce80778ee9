"""The pretraining loop (paper, A.1)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from iwm.config_io import to_yaml
from iwm.models.flops import measure_matmul_flops, training_flops
from iwm.models.world_model import WorldModel
from iwm.training import checkpoint as checkpoints
from iwm.training.distributed import StopConsensus
from iwm.training.metrics import MetricLogger, MetricWindow, memory_gib, truncate_metrics_after
from iwm.training.runtime import StopFlag, manual_gc
from iwm.training.step import prepare_masks, train_step
from iwm.training.train_state import TrainState, to_checkpoint
from shards.atomic import write_atomically
from shards.errors import UserError


class TrainingError(UserError):
    """Training that cannot continue; the message names the cause and the remedy."""


def pretrain(
    state: TrainState, stop: StopFlag, validate: Callable[[WorldModel], dict[str, float]] | None = None
) -> None:
    """Train until the configured end or until `stop` is set, then save a checkpoint.

    validate: returns metrics of the model, logged every log.eval_interval steps; None: no validation.
    Raises TrainingError where the gradient stays non-finite, or the last checkpoint cannot be written.
    """
    s, config, dist = state, state.config, state.dist
    if dist.is_main:
        write_atomically(s.run / "config.yaml", to_yaml(config).encode())
        truncate_metrics_after(s.run, s.step)
    flops_share = training_flops(config).total / measure_matmul_flops(dist.device, config.train.precision) / dist.size
    agreement, streak = StopConsensus(dist), 0
    with (
        manual_gc(),
        MetricLogger(
            s.run, f"iwm · {s.run}", s.schedules.steps, s.step, main=dist.is_main, tensorboard=config.log.tensorboard
        ) as monitor,
    ):
        for line in s.startup_messages:
            monitor.print(line)
        window, ended, saved = MetricWindow(), s.step >= s.schedules.steps, True
        while not ended:
            values = s.schedules.values_at(s.step)
            waiting = time.perf_counter()
            batches = [next(s.loader) for _ in range(s.accumulation)]
            window.waited += time.perf_counter() - waiting
            masks = [prepare_masks(config, dist, s.step, part, s.micro_batch) for part in range(s.accumulation)]
            window.results.append(train_step(s.model, s.forward_backward, s.optimizer, batches, masks, values))
            window.keys.append([batch.keys for batch in batches])
            s.step += 1
            s.samples += config.data.global_batch_size
            monitor.set_step(s.step)
            ended = agreement.any_rank_stopped(bool(stop)) or s.step == s.schedules.steps

            if s.step % config.log.interval == 0 or ended:
                loss, norm, skipped, speed = window.read(dist, config.data.global_batch_size)
                flags = skipped.tolist()
                s.skipped += sum(flags)
                streak = _streak(flags, streak, config.train.max_nonfinite_steps, window)
                monitor.log(
                    s.step,
                    {
                        "loss": loss[~skipped].mean().item(),
                        "gradient_norm": norm[~skipped].mean().item(),
                        **speed,
                        "mfu": speed["images_per_second"] * flops_share,
                        "lr": values.lr,
                        "weight_decay": values.weight_decay,
                        "ema": values.ema,
                        "samples": s.samples,
                        "epoch": s.samples / s.loader.samples_per_epoch,
                        "skipped": s.skipped,
                        "memory_gib": memory_gib(dist.device),
                    },
                )
                gc.collect()
                window = MetricWindow()
            if validate is not None and (s.step % config.log.eval_interval == 0 or s.step == s.schedules.steps):
                monitor.log(s.step, validate(s.model))
                window = MetricWindow()
            if s.step % config.log.checkpoint_interval == 0 or ended:
                saved = _save(s, monitor)
        if s.step < s.schedules.steps:
            monitor.print(f"stopped by a signal after step {s.step:,}; rerun the same command to resume")
    if not saved:
        raise TrainingError(
            f"{s.run}: the last checkpoint could not be written; free disk space and rerun the same command"
        )


def _streak(flags: list[bool], before: int, limit: int, window: MetricWindow) -> int:
    """Return the current number of consecutive skipped steps, of which `before` precede the window.

    Raises TrainingError, which names the samples of the last one, where the number reaches `limit`.
    """
    streak = before
    for flag, keys in zip(flags, window.keys, strict=True):
        streak = streak + 1 if flag else 0
        if streak >= limit:
            samples = ", ".join(key for part in keys for key in part)
            raise TrainingError(
                f"the gradient was not finite in {streak} steps in a row; they were skipped, and the last checkpoint "
                f"is valid. Lower --optim.lr, set --optim.grad-clip, or check the samples of the last step: {samples}"
            )
    return streak


def _save(state: TrainState, monitor: MetricLogger) -> bool:
    """Write a checkpoint and delete old ones. Return False, after a warning, where it could not be written."""
    content = to_checkpoint(state)
    if not state.dist.is_main:
        return True
    try:
        checkpoints.save_checkpoint(state.run, content)
    except OSError as error:
        monitor.print(f"WARNING: {error}. Free disk space; training continues to the next checkpoint")
        return False
    checkpoints.prune_checkpoints(state.run, state.config.log.keep_last_k, state.config.log.keep_every)
    return True

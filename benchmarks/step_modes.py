"""Step benchmarks: data alone, model alone, both as in training, and both concurrently.

Each `measure_…` takes the same state that training would use (iwm/training/train_state.py) and a number of steps. It
runs a step of the training loop, or a part of it, that many times. All processes must call it with the same number. The
first steps after another measurement depend on the state of the pipeline's queue: call it once with `cooldown_steps`
and discard the result.

A BaselineStep is another implementation of a whole optimiser step on the same resident batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Semaphore
from typing import NamedTuple

import torch
from timing import StepTimings, time_steps

from dali_pipelines.loader import ViewBatch
from iwm.config import Config
from iwm.training.distributed import DistEnv
from iwm.training.optim import set_lr_wd, step_if_finite
from iwm.training.step import prepare_masks, train_step
from iwm.training.train_state import TrainState, build_train_state


def new_train_state(config: Config, dist: DistEnv) -> TrainState:
    """Return a new training state. Raises ConfigError and ShardError as training does."""
    with TemporaryDirectory() as nothing_to_resume:
        return build_train_state(config, Path(nothing_to_resume), dist)


def resident_batches(state: TrainState) -> list[ViewBatch]:
    """Return the batches of one step, copied out of the pipeline's memory."""
    return [next(state.loader).clone() for _ in range(state.accumulation)]


def cooldown_steps(state: TrainState) -> int:
    """Return the number of steps after which the pipeline's queue no longer depends on earlier measurements."""
    return state.config.data.prefetch_queue_depth + 2


def take_step(state: TrainState, batches: Sequence[ViewBatch]) -> None:
    """Run one optimiser step as in training, with the masks of that step."""
    s = state
    masks = [prepare_masks(s.config, s.dist, s.step, part, s.micro_batch) for part in range(s.accumulation)]
    train_step(s.model, s.forward_backward, s.optimizer, batches, masks, s.schedules.values_at(s.step))
    s.step += 1


def measure_data(state: TrainState, steps: int) -> StepTimings:
    """Measure mode `data`: the pipeline makes the batches of each step, and nothing else runs."""
    return time_steps(lambda: _next_batches(state), steps, state.dist.device)


def measure_model(state: TrainState, batches: Sequence[ViewBatch], steps: int) -> StepTimings:
    """Measure mode `model`: training steps on resident batches, each with its own masks; the pipeline is idle."""
    return time_steps(lambda: take_step(state, batches), steps, state.dist.device)


def measure_end_to_end(state: TrainState, steps: int) -> StepTimings:
    """Measure mode `end-to-end`: training as in iwm/training/loop.py between two lines of metrics."""
    waited = 0.0

    def step() -> None:
        nonlocal waited
        start = time.perf_counter()
        batches = _next_batches(state)
        waited += time.perf_counter() - start
        take_step(state, batches)

    return time_steps(step, steps, state.dist.device)._replace(waited=waited)


def measure_interference(state: TrainState, batches: Sequence[ViewBatch], steps: int) -> StepTimings:
    """Measure mode `interference`: steps on resident batches while the pipeline makes as many as they would use.

    Those batches are discarded, and no step waits for them; a pipeline that comes late makes fewer in this time. The
    slowdown from `model` to `interference` is the cost of the pipeline's concurrent work; the further slowdown to
    `end-to-end` is waiting for data. Raises ShardError as the loader does.
    """
    device, wanted, over = state.dist.device, Semaphore(0), Event()

    def make_and_drop() -> None:
        # On its own stream, because the loader makes the current stream wait for the batch.
        with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
            while wanted.acquire() and not over.is_set():
                _next_batches(state)

    def step() -> None:
        wanted.release()
        take_step(state, batches)

    with ThreadPoolExecutor(1) as thread:
        pipeline = thread.submit(make_and_drop)
        try:
            window = time_steps(step, steps, device)
        finally:
            over.set()
            wanted.release()
        pipeline.result()
    return window


def measure_updates(state: TrainState, steps: int) -> dict[str, StepTimings]:
    """Measure the optimiser and the EMA of the target encoder alone, on the gradient of the last training step.

    The learning rate is zero during the measurement, so that parameters do not change; the work is the same.
    """
    device, finite = state.dist.device, torch.zeros((), dtype=torch.bool, device=state.dist.device)
    momentum = state.schedules.values_at(state.step).ema
    set_lr_wd(state.optimizer, lr=0.0, weight_decay=0.0)
    return {
        "optimiser": time_steps(lambda: step_if_finite(state.optimizer, finite), steps, device),
        "ema": time_steps(lambda: state.model.update_target(momentum), steps, device),
    }


def _next_batches(state: TrainState) -> list[ViewBatch]:
    return [next(state.loader) for _ in range(state.accumulation)]


def token_counts(state: TrainState, steps: int = 20) -> dict[str, dict[str, float]]:
    """Return the tokens per image that each part processes, and those that are needed; the rest is padding.

    Averages are over the masks of the first `steps` steps of this process.
    """
    s = state
    drawn = [prepare_masks(s.config, s.dist, step, 0, s.micro_batch) for step in range(steps)]
    images = steps * s.micro_batch
    target = [(masks.visible.numel(),) * 2 for masks in drawn]
    context = [(len(masks.context.token_index), int(masks.visible.sum())) for masks in drawn]
    predictor = []
    for masks in drawn:
        places = masks.predicted.numel() + masks.predicted.shape[:2].numel() * s.model.predictor.num_action_tokens
        if masks.predictor is None:
            predictor.append((places, places))
        else:
            predictor.append((len(masks.predictor.token_index), int((masks.predictor.token_index < places).sum())))
    return {
        name: {
            "processed": sum(processed for processed, _ in counts) / images,
            "needed": sum(needed for _, needed in counts) / images,
        }
        for name, counts in (("context_encoder", context), ("target_encoder", target), ("predictor", predictor))
    }


class BaselineStep(NamedTuple):
    """Another implementation of a training step. Rates are compared by the FLOPs that each needs."""

    name: str
    step: Callable[[int], None]
    """Runs the optimiser step of the given number, counted from 0, on resident batches."""
    flops: float
    """Floating-point operations needed per image, as counted in iwm/models/flops.py."""
    images: int
    """Number of images per step on this process."""


MakeBaseline = Callable[[Config, DistEnv, Sequence[ViewBatch]], BaselineStep]
"""Function that builds a BaselineStep for the resident batches of a step."""


def measure_baseline(dist: DistEnv, contender: BaselineStep, steps: int) -> StepTimings:
    """Measure steps of a baseline in the same way as the model's steps."""
    numbers = count()
    return time_steps(lambda: contender.step(next(numbers)), steps, dist.device)

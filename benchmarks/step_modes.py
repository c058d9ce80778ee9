"""What is measured of training: its data alone, its model alone, both as in training, and both beside each other.

Each `measure_…` takes a training session (iwm/training/session.py), the very one that training would open, and a
number of steps; it takes one step of training's loop that many times, or the part of it that is meant. All processes
of the session must call it with the same number. The first steps after another measurement find the pipeline's queue
as that one left it: call once with `settling_steps` and drop the result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Semaphore

import torch
from stopwatch import Window, watch

from dali_pipelines.loader import Batch
from iwm.config import Config
from iwm.training.distributed import World
from iwm.training.optim import set_values, step_unless
from iwm.training.session import Session, open_session
from iwm.training.step import masks_for, train_step


def open_subject(config: Config, here: World) -> Session:
    """Everything that training holds, newly begun. Raises ConfigError and ShardError as training does."""
    with TemporaryDirectory() as nothing_to_resume:
        return open_session(config, Path(nothing_to_resume), here)


def resident_batches(session: Session) -> list[Batch]:
    """The batches of one step out of the pipeline, copied out of its memory, to stay where they are."""
    return [next(session.loader).clone() for _ in range(session.accumulation)]


def settling_steps(session: Session) -> int:
    """Steps until the pipeline's queue no longer shows what was measured before."""
    return session.config.data.prefetch + 2


def take_step(session: Session, batches: Sequence[Batch]) -> None:
    """One optimiser step as training takes it, with the masks of that step."""
    s = session
    masks = [masks_for(s.config, s.here, s.step, part, s.micro_batch) for part in range(s.accumulation)]
    train_step(s.model, s.gradient, s.optimizer, batches, masks, s.schedules.at(s.step))
    s.step += 1


def measure_data(session: Session, steps: int) -> Window:
    """A: the pipeline makes the batches of each step, and nothing else runs."""
    return watch(lambda: _next_batches(session), steps, session.here.device)


def measure_model(session: Session, batches: Sequence[Batch], steps: int) -> Window:
    """B: training steps on resident batches, each with masks of its own; the pipeline rests."""
    return watch(lambda: take_step(session, batches), steps, session.here.device)


def measure_end_to_end(session: Session, steps: int) -> Window:
    """C: training, as iwm/training/loop.py has it between two lines of metrics."""
    waited = 0.0

    def step() -> None:
        nonlocal waited
        start = time.perf_counter()
        batches = _next_batches(session)
        waited += time.perf_counter() - start
        take_step(session, batches)

    return watch(step, steps, session.here.device)._replace(waited=waited)


def measure_interference(session: Session, batches: Sequence[Batch], steps: int) -> Window:
    """D: training steps on resident batches while the pipeline makes as many batches as they would have used.

    Those are dropped and never waited for. What is slower than B here, the pipeline costs by being at work; what is
    slower still in C is waiting. Raises ShardError as the loader does.
    """
    device, wanted, over = session.here.device, Semaphore(0), Event()

    def make_and_drop() -> None:
        # On a stream of its own: the loader makes the current stream wait for the batch.
        with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
            while wanted.acquire() and not over.is_set():
                _next_batches(session)

    def step() -> None:
        wanted.release()
        take_step(session, batches)

    with ThreadPoolExecutor(1) as thread:
        pipeline = thread.submit(make_and_drop)
        try:
            window = watch(step, steps, device)
        finally:
            over.set()
            wanted.release()
        pipeline.result()
    return window


def measure_updates(session: Session, steps: int) -> dict[str, Window]:
    """The optimiser and the EMA of the target encoder by themselves, on the gradient of the last training step.

    The learning rate is zero meanwhile, so that parameters stay as they are; the work is the same.
    """
    device, finite = session.here.device, torch.zeros((), dtype=torch.bool, device=session.here.device)
    momentum = session.schedules.at(session.step).ema
    set_values(session.optimizer, lr=0.0, weight_decay=0.0)
    return {
        "optimiser": watch(lambda: step_unless(session.optimizer, finite), steps, device),
        "ema": watch(lambda: session.model.update_target(momentum), steps, device),
    }


def _next_batches(session: Session) -> list[Batch]:
    return [next(session.loader) for _ in range(session.accumulation)]


def token_counts(session: Session, steps: int = 20) -> dict[str, dict[str, float]]:
    """Tokens per image that each part processes, and those of them that are needed; the rest is filling. Over the
    masks of the first `steps` steps of this process."""
    s = session
    drawn = [masks_for(s.config, s.here, step, 0, s.micro_batch) for step in range(steps)]
    images = steps * s.micro_batch
    target = [(masks.visible.numel(),) * 2 for masks in drawn]
    context = [(len(masks.context.place), int(masks.visible.sum())) for masks in drawn]
    predictor = []
    for masks in drawn:
        places = masks.queried.numel() + masks.queried.shape[:2].numel() * s.model.predictor.extra
        if masks.rows is None:
            predictor.append((places, places))
        else:
            predictor.append((len(masks.rows.place), int((masks.rows.place < places).sum())))
    return {
        name: {
            "processed": sum(processed for processed, _ in counts) / images,
            "needed": sum(needed for _, needed in counts) / images,
        }
        for name, counts in (("context_encoder", context), ("target_encoder", target), ("predictor", predictor))
    }

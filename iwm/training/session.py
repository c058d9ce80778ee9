"""A run in memory: everything that training holds, built fresh or from its newest checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dali_pipelines.decoder import GpuDecoder
from dali_pipelines.endless import StateError
from dali_pipelines.loader import ViewLoader
from iwm.config import Config, ConfigError
from iwm.models.world_model import WorldModel
from iwm.training import checkpoint as checkpoints
from iwm.training.checkpoint import Checkpoint
from iwm.training.cuda_graph import gradient_for
from iwm.training.distributed import World, loader_threads
from iwm.training.optim import build_optimizer, load_state, state_for_checkpoint
from iwm.training.parallel import whole, wrap
from iwm.training.resume import resume_point
from iwm.training.schedules import Schedules, schedules
from iwm.training.step import Gradient


@dataclass
class Session:
    """`step`, `samples` and `skipped` count what is done; all else stays as it was built."""

    config: Config
    run: Path
    here: World
    loader: ViewLoader
    loader_seed: int
    micro_batch: int
    accumulation: int
    model: WorldModel
    gradient: Gradient
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    opening: list[str]
    """What to tell the user before the first step."""
    step: int = 0
    samples: int = 0
    skipped: int = 0


def open_session(config: Config, run: Path, here: World) -> Session:
    """Build everything; go on from the newest checkpoint in `run` if there is one.

    Raises ConfigError, ShardError and CheckpointError for what the user can mend.
    """
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    micro_batch, accumulation = split_batch(config.data.batch, config.data.micro_batch, here.size, "data.")
    start, changes = resume_point(run, config)
    loader, seed, restart = _open_loader(config, here, micro_batch, start)
    model = WorldModel(config).prepare(here.device, compiled=config.train.compile)
    if start is not None:
        model.load_state_dict(start.model, strict=True)
    attention = ", ".join(f"{part} {kernel}" for part, kernel in model.attention_kernels().items())
    wrapped = wrap(model, here, accumulation)
    gradient, issued = gradient_for(model, wrapped, here)
    optimizer, kernels = build_optimizer(model, config.optim, here.device)
    if start is not None:
        load_state(optimizer, start.optimizer)
        checkpoints.set_rng_state(start.rng)
    plan = schedules(config, max(1, loader.steps_per_epoch // accumulation))
    encoder, predictor = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.predictor))
    opening = [
        f"{run}: {plan.steps:,} steps of {config.data.batch} images ({here.size} × {micro_batch} × {accumulation}: "
        f"processes, images at once, passes) on {here.device.type}, {config.train.precision}, {kernels}",
        f"{loader.samples_per_epoch:,} images in {config.data.shards} '{config.data.train}'; context encoder "
        f"{encoder:.2f} M parameters, predictor {predictor:.2f} M, {config.action.conditioning} conditioning",
        f"attention: {attention} (torch {torch.__version__}); forward and backward passes {issued}",
        *(f"changed since the last checkpoint: {change}" for change in changes),
        *restart,
        *([f"going on from step {start.step:,} ({start.samples:,} images seen)"] if start is not None else []),
    ]
    return Session(
        config=config,
        run=run,
        here=here,
        loader=loader,
        loader_seed=seed,
        micro_batch=micro_batch,
        accumulation=accumulation,
        model=model,
        gradient=gradient,
        optimizer=optimizer,
        schedules=plan,
        opening=opening,
        step=start.step if start is not None else 0,
        samples=start.samples if start is not None else 0,
        skipped=start.skipped if start is not None else 0,
    )


def split_batch(batch: int, most: int | None, processes: int, options: str) -> tuple[int, int]:
    """Images per process at once (`most` of them, or all), and passes per step.

    ConfigError where the batch cannot be split evenly; `options` stands before the names batch and micro_batch in it.
    """
    if batch % processes:
        raise ConfigError(
            f"{options}batch {batch} cannot be split over {processes} processes; choose a multiple of {processes}"
        )
    share = batch // processes
    micro_batch = min(share, most or share)
    if share % micro_batch:
        raise ConfigError(
            f"{options}micro_batch {most} does not divide the {share} images of a step of each of {processes} processes"
        )
    return micro_batch, share // micro_batch


MAY_RESTART = {"batch_size", "world_size", "rank", "device", "dali"}
"""What can differ from the checkpoint's pipeline without the data being other data: then a new epoch begins."""


def _open_loader(
    config: Config, here: World, micro_batch: int, start: Checkpoint | None
) -> tuple[ViewLoader, int, list[str]]:
    """The pipeline, in mid-epoch where the checkpoint's state fits; its seed; what to say where it does not fit.

    Raises StateError where the checkpoint was trained on other data.
    """

    def open_with(seed: int, state: dict[str, Any] | None) -> ViewLoader:
        return ViewLoader(
            config.data.shards,
            config.data.train,
            config.views,
            batch_size=micro_batch,
            seed=seed,
            device=here.device,
            rank=here.rank,
            world_size=here.size,
            threads=config.data.threads or loader_threads(here.device, here.local_size),
            prefetch=config.data.prefetch,
            decoder=GpuDecoder(
                config.data.hw_decoder_load, config.data.decoder_width_hint, config.data.decoder_height_hint
            ),
            state=state,
        )

    if start is None:
        return open_with(config.train.seed, None), config.train.seed, []
    states = start.loader["ranks"]
    try:
        seed = start.loader["seed"]
        return open_with(seed, states[here.rank if here.rank < len(states) else 0]), seed, []
    except StateError as error:
        if not error.different <= MAY_RESTART:
            raise
        seed = config.train.seed + start.samples
        change = f"{error} → a new epoch begins, in a new order, after the {start.samples:,} images seen"
        return open_with(seed, None), seed, [change]


def checkpoint_of(session: Session) -> Checkpoint:
    """The session as it would be saved now. Every process must call this, for each has its own pipeline state."""
    return Checkpoint(
        config=session.config,
        step=session.step,
        samples=session.samples,
        skipped=session.skipped,
        model={name: whole(value) for name, value in session.model.state_dict().items()},
        optimizer=state_for_checkpoint(session.optimizer),
        rng=checkpoints.rng_state(),
        loader={
            "seed": session.loader_seed,
            "ranks": session.here.gather(session.loader.state()),
        },
        versions=checkpoints.versions(),
    )

"""Training state: built at step 0 or resumed from the run's newest checkpoint."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from dali_pipelines.loader import LoaderStateError, ViewLoader
from iwm.config import Config, ConfigError
from iwm.config_io import config_diff, split_changes
from iwm.models.fp8 import convert_to_fp8
from iwm.models.world_model import WorldModel
from iwm.training import checkpoint as checkpoints
from iwm.training.checkpoint import Checkpoint, load_newest
from iwm.training.cuda_graph import build_forward_backward
from iwm.training.distributed import DistEnv, loader_threads
from iwm.training.held_out import missing_split_message
from iwm.training.initial_weights import load_initial_weights, read_initial_weights
from iwm.training.optim import Schedules, build_optimizer, build_schedules, load_optimizer_state, optimizer_state_dict
from iwm.training.parallel import parallelize
from iwm.training.runtime import select_backend
from iwm.training.step import ForwardBackward
from shards.few_images import few_images_advice


@dataclass
class TrainState:
    """Objects and counters of a training run. Only the counters `step`, `samples` and `skipped` are reassigned."""

    config: Config
    run: Path
    dist: DistEnv
    loader: ViewLoader
    loader_seed: int
    micro_batch: int
    """Images per process and pass."""
    accumulation: int
    """Passes per optimiser step (gradient accumulation)."""
    model: WorldModel
    forward_backward: ForwardBackward
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    startup_messages: list[str]
    """Lines to print before the first step."""
    step: int = 0
    """Number of completed optimiser steps."""
    samples: int = 0
    """Number of images trained on, over all processes."""
    skipped: int = 0
    """Number of steps skipped because of a non-finite gradient."""


def build_train_state(config: Config, run: Path, dist: DistEnv) -> TrainState:
    """Build the training state; resume from the newest checkpoint in `run` if there is one.

    Raises ConfigError, ShardError and CheckpointError for errors that the user can fix.
    """
    torch.manual_seed(config.train.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    data = config.data
    names = ("data.global_batch_size", "data.micro_batch_size")
    micro_batch, accumulation = split_batch(data.global_batch_size, data.micro_batch_size, dist.size, names)
    start, changes = find_resume_checkpoint(run, config)
    # Read before the data is opened, so that another encoder's weights are refused at once.
    initial = read_initial_weights(config.init_from, config) if config.init_from and start is None else None
    loader, seed, restart = _open_loader(config, dist, micro_batch, start)
    advice = [*few_images_advice(loader.samples_per_epoch), *missing_split_message(data)]
    model, precision = build_model(config, dist.device, micro_batch)
    if start is not None:
        model.load_state_dict(start.model, strict=True)
    origin = load_initial_weights(initial, model) if initial is not None else []
    attention = ", ".join(f"{part} {kernel}" for part, kernel in model.attention_kernels().items())
    wrapped = parallelize(model, dist, accumulation)
    forward_backward, issued = build_forward_backward(model, wrapped, dist)
    optimizer, kernels = build_optimizer(model, config.optim, dist.device)
    if start is not None:
        load_optimizer_state(optimizer, start.optimizer)
        checkpoints.set_rng_state(start.rng)
    schedules = build_schedules(config, max(1, loader.batches_per_epoch // accumulation))
    encoder, predictor = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.predictor))
    messages = [
        f"{run}: {schedules.steps:,} steps of {config.data.global_batch_size} images ({dist.size} processes × "
        f"{micro_batch} images × {accumulation} passes) on {dist.device.type}, {precision}, {kernels}",
        f"{loader.samples_per_epoch:,} images in {config.data.shards} '{config.data.train}', backend {loader.backend}; "
        f"context encoder {encoder:.2f} M parameters, predictor {predictor:.2f} M, {config.action.conditioning} "
        "conditioning",
        f"attention: {attention} (torch {torch.__version__}); forward and backward passes {issued}",
        *([loader.cache.description] if loader.cache else []),
        *([f"launched by {dist.launched_by}"] if dist.launched_by else []),
        *advice,
        *origin,
        *(f"changed since the last checkpoint: {change}" for change in changes),
        *restart,
        *([f"resuming from step {start.step:,} ({start.samples:,} images seen)"] if start is not None else []),
    ]
    return TrainState(
        config=config,
        run=run,
        dist=dist,
        loader=loader,
        loader_seed=seed,
        micro_batch=micro_batch,
        accumulation=accumulation,
        model=model,
        forward_backward=forward_backward,
        optimizer=optimizer,
        schedules=schedules,
        startup_messages=messages,
        step=start.step if start is not None else 0,
        samples=start.samples if start is not None else 0,
        skipped=start.skipped if start is not None else 0,
    )


def build_model(config: Config, device: torch.device, batch: int) -> tuple[WorldModel, str]:
    """Return an initialised model on the device, in the run's precision and compiled where configured.

    The string describes the precision. batch: images per pass. Raises ConfigError where the precision is not available.
    """
    model = WorldModel(config)
    precision: str = config.train.precision
    if config.train.precision == "fp8":
        precision = convert_to_fp8(model, device, batch)
    return model.setup(device, compiled=config.train.compile), precision


def split_batch(batch: int, most: int | None, processes: int, names: tuple[str, str]) -> tuple[int, int]:
    """Return images per process and pass (at most `most`), and passes per step.

    names: options of batch size and micro-batch size. Raises ConfigError where the batch cannot be split evenly.
    """
    if batch % processes:
        raise ConfigError(
            f"{names[0]} {batch} cannot be split over {processes} processes; choose a multiple of {processes}"
        )
    share = batch // processes
    micro_batch = min(share, most or share)
    if share % micro_batch:
        raise ConfigError(
            f"{names[1]} {most} does not divide the {share} images per step and process; choose a divisor of {share}"
        )
    return micro_batch, share // micro_batch


LOADER_RESET_FIELDS = {"batches", "batch_size", "world_size", "rank", "device", "backend", "decoder", "dali"}
"""Loader settings that may change on resume; the epoch restarts."""


def _open_loader(
    config: Config, dist: DistEnv, micro_batch: int, start: Checkpoint | None
) -> tuple[ViewLoader, int, list[str]]:
    """Return the pipeline, its seed, and a message if the epoch restarts.

    The pipeline resumes in mid-epoch where the checkpoint's loader state fits. Raises LoaderStateError where the
    checkpoint was trained on other data.
    """

    backend = select_backend(config.data.backend, dist.device, config.views, "data.backend")

    def open_with(seed: int, state: dict[str, Any] | None) -> ViewLoader:
        return ViewLoader(
            config.data.folder,
            config.data.train,
            config.views,
            batch_size=micro_batch,
            seed=seed,
            backend=backend,
            device=dist.device,
            rank=dist.rank,
            world_size=dist.size,
            num_threads=config.data.num_threads or loader_threads(dist.device, dist.local_size),
            prefetch_queue_depth=config.data.prefetch_queue_depth,
            decoder=config.data.decoder,
            state=state,
        )

    if start is None:
        return open_with(config.train.seed, None), config.train.seed, []
    states = start.loader["ranks"]
    try:
        seed = start.loader["seed"]
        return open_with(seed, states[dist.rank if dist.rank < len(states) else 0]), seed, []
    except LoaderStateError as error:
        if not error.different <= LOADER_RESET_FIELDS:
            raise
        seed = config.train.seed + start.samples
        change = f"{error}; a new epoch begins, in a new order, after the {start.samples:,} images seen"
        return open_with(seed, None), seed, [change]


def checkpoint_parts(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a checkpoint's fields, whose `loader` lacks `ranks`, and the state of this process's pipeline.

    Checkpoint.gathered makes a checkpoint of them and of the other processes' pipelines. The tensors are the live ones,
    which the next step changes: sharded under FSDP, and on the device.
    """
    fields = Checkpoint(
        config=state.config,
        step=state.step,
        samples=state.samples,
        skipped=state.skipped,
        model=dict(state.model.state_dict()),
        optimizer=optimizer_state_dict(state.optimizer),
        rng=checkpoints.rng_state(),
        loader={"seed": state.loader_seed},
        versions=checkpoints.versions(),
    )
    return vars(fields), state.loader.state_dict()


def checkpoint_tensors(state: TrainState) -> list[torch.Tensor]:
    """Return tensors of the sizes of a checkpoint's model and moments, before the first step too."""
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    return [*state.model.state_dict().values(), *trained, *trained]


RESUMABLE_CHANGES = (
    "data.shards",
    "data.cache",
    "data.cache_gb",
    "data.val",
    "data.backend",
    "data.num_threads",
    "data.prefetch_queue_depth",
    "data.hw_decoder_load",
    "data.decoder_",
    "data.micro_batch_size",
    "optim.implementation",
    "train.device",
    "train.num_threads",
    "train.precision",
    "train.compile",
    "train.compile_mode",
    "train.activation_checkpointing",
    "train.activation_memory_budget",
    "train.parallel",
    "train.cuda_graph",
    "train.priority_stream",
    "train.deterministic",
    "train.collective_timeout",
    "log.",
)
"""Fields that may change on resume, in the form of config_io.split_changes. They change the model by rounding at most;
another data.micro_batch_size, data.backend or train.device also restarts the epoch."""


LOCK_WAIT = 15.0
"""Time (seconds) that a run waits for the lock of its folder. The processes of a killed launcher end within it."""


@contextmanager
def run_lock(run: Path, option: str = "--run-dir") -> Iterator[None]:
    """Lock a run folder against other processes that train in it. The lock ends with the process, however it ends.

    Waits up to LOCK_WAIT for a process that is ending, and says so. Raises ConfigError, which names `option` and the
    holder, where another process keeps the lock.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "a+") as file:
        until = time.monotonic() + LOCK_WAIT
        waiting = False
        while not _try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "another training process"
            if time.monotonic() > until:
                raise ConfigError(f"{run} is in use by {holder}; wait for it or choose another {option}")
            if not waiting:
                print(f"waiting up to {LOCK_WAIT:.0f} s for {holder} to leave {run}", flush=True)
            waiting = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"another training process ({os.getpid()} on host {socket.gethostname()})\n")
        file.flush()
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def find_resume_checkpoint(run: Path, config: Config) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint to resume from, None without one, and a line for each changed setting.

    Raises ConfigError, which names each setting, where settings differ that must not change on resume.
    """
    checkpoint = load_newest(run)
    if checkpoint is None:
        return None, []
    allowed, refused = split_changes(config_diff(checkpoint.config, config), RESUMABLE_CHANGES)
    if refused:
        changes = ", ".join(f"--{key} {now} (the run has {then})" for key, (then, now) in refused.items())
        raise ConfigError(
            f"{run} holds a run with other settings: {changes}; use the run's settings, or choose another --run-dir"
        )
    return checkpoint, [f"{key}: {then} → {now}" for key, (then, now) in allowed.items()]

"""Run context of a protocol: settings, pretrained models, the state to resume from, and the opening of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dali_pipelines.crops import CropSettings
from dali_pipelines.loader import LoaderStateError
from iwm.config import ConfigError
from iwm.downstream.cached_features import CachedFeatures
from iwm.downstream.pretrained import Pretrained
from iwm.downstream.progress import load_last
from iwm.downstream.settings import MixupSettings, TrainSettings
from iwm.downstream.study import FrozenEncoders, Task
from iwm.downstream.tasks import ClassificationTask, LabelColumn
from iwm.evaluation.result_table import ResultTable
from iwm.training.checkpoint import file_digest
from iwm.training.distributed import DistEnv, loader_threads
from iwm.training.runtime import StopFlag
from iwm.training.train_state import LOADER_RESET_FIELDS, split_batch
from shards.format import load_manifest
from shards.split_part import ALL_IMAGES, TrainingParts

TaskT = TypeVar("TaskT", bound=Task)


@dataclass(frozen=True)
class RunContext:
    """Settings, pretrained models, output and processes of one run of a protocol."""

    name: str
    settings: TrainSettings
    pretrained: Pretrained
    dist: DistEnv
    output: Path
    """RUN/eval/NAME.json; the state of the training is in `folder`, next to it."""
    micro_batch: int
    """Images per task in one pass of this process. Until choose_micro_batch: --micro-batch-size, or the whole share of
    the process."""
    accumulation: int
    """Passes per optimiser step."""
    last: dict[str, Any] | None
    """Content of last.pt to resume from; None for a new training."""
    identity: dict[str, Any] = field(repr=False)
    """Flat settings and checkpoint (run_fingerprint). Training resumes only if they are the same."""
    holds_out: bool = False
    """True where training images are held out, by which trial and epoch are chosen."""

    @property
    def folder(self) -> Path:
        """RUN/eval/NAME."""
        return self.output.with_suffix("")

    @property
    def compiled(self) -> bool:
        """True where encoders and predictors are compiled."""
        return self.settings.compile == "yes" or (self.settings.compile == "auto" and self.dist.device.type == "cuda")


def training_parts(context: RunContext, shards: Path, split: str) -> TrainingParts:
    """Return the parts of a training split. Raises ConfigError where too few images would be held out or trained on."""
    if not context.holds_out:
        return ALL_IMAGES
    images, share = load_manifest(shards, split).samples, context.settings.selection_share
    count = max(1, round(share * images))
    if not context.dist.size <= count <= images - context.dist.size:
        raise ConfigError(
            f"--selection-share {share:g}: {count:,} of {images:,} images of '{split}' are held out, and each of "
            f"{context.dist.size} processes needs one for the choice and one for training; change the share, or use "
            "--selection val"
        )
    return TrainingParts.holding_out(count)


def open_run(name: str, settings: TrainSettings, pretrained: Pretrained, output: Path, dist: DistEnv) -> RunContext:
    """Load the state to resume from, split the batch into passes, and set up (and compile) the frozen encoders.

    Raises ConfigError for options that do not fit, CheckpointError for a damaged last.pt.
    """
    micro_batch, accumulation = split_batch(
        settings.batch_size, settings.micro_batch_size, dist.size, ("--batch-size", "--micro-batch-size")
    )
    identity = run_fingerprint(name, settings, pretrained)
    last = load_last(output.with_suffix(""), identity, dist.device)
    context = RunContext(name, settings, pretrained, dist, output, micro_batch, accumulation, last, identity)
    for encoder in pretrained.encoders.values():
        encoder.setup(dist.device, compiled=context.compiled, attention=pretrained.attention)
    return context


def column_of(context: RunContext, label: str | None = None, name: str | None = None) -> LabelColumn:
    """Return a label column of the run's data as the task `name`. label: column; default: --data.label."""
    data, pretrained = context.settings.data, context.pretrained
    label = label or data.label
    return LabelColumn(
        name=name or label,
        shards=pretrained.shards,
        train=pretrained.train,
        val=pretrained.val,
        label=label,
        size=pretrained.img_size,
    )


def open_task(
    context: RunContext,
    column: LabelColumn,
    crops: CropSettings,
    mixing: MixupSettings,
    encoders: FrozenEncoders | None,
    *,
    number: int = 0,
) -> ClassificationTask | CachedFeatures:
    """Open a column as task `number`, where the training stopped (resume_task).

    encoders: encoders whose features of centre crops are computed once and cached; None for augmented crops.
    """
    loading, parts = loading_of(context), training_parts(context, column.shards, column.train)
    if encoders is not None:
        return CachedFeatures(
            column,
            encoders,
            interpolation=crops.interpolation,
            parts=parts,
            batch_size=context.micro_batch,
            label_smoothing=mixing.label_smoothing,
            seed=_seed(context, number),
            dist=context.dist,
            loading=loading,
            bf16=context.pretrained.bf16,
        )

    def open_with(seed: int, state: dict[str, Any] | None) -> ClassificationTask:
        return ClassificationTask(
            column,
            crops,
            mixing,
            parts=parts,
            batch_size=context.micro_batch,
            seed=seed,
            dist=context.dist,
            loading=loading,
            state=state,
        )

    return resume_task(context, number, open_with)


def loading_of(context: RunContext) -> dict[str, Any]:
    """Return the arguments that all loaders of this process share."""
    data, dist = context.settings.data, context.dist
    return {
        "device": dist.device,
        "rank": dist.rank,
        "world_size": dist.size,
        "num_threads": data.num_threads or loader_threads(dist.device, dist.local_size),
        "prefetch_queue_depth": data.prefetch_queue_depth,
    }


def resume_task(context: RunContext, number: int, open_with: Callable[[int, dict[str, Any] | None], TaskT]) -> TaskT:
    """Open task `number` where the training stopped.

    open_with: opens the task with a seed and a loader's state. A state of another number of processes or another device
    cannot be resumed: the task begins a new epoch in a new order. Raises ConfigError for a state of other data.
    """
    seed = _seed(context, number)
    if context.last is None:
        return open_with(seed, None)
    ranks = context.last["ranks"]
    state = ranks[context.dist.rank if context.dist.rank < len(ranks) else 0]["tasks"][number]
    try:
        return open_with(state["seed"], state)
    except LoaderStateError as error:
        if not error.different <= LOADER_RESET_FIELDS:
            raise ConfigError(
                f"{context.folder} holds a training on other data ({', '.join(sorted(error.different))} changed); "
                "delete the folder, or choose another --output"
            ) from error
        return open_with(seed + context.last["progress"]["step"], None)


def _seed(context: RunContext, number: int) -> int:
    """Return the seed of a task's order and augmentations."""
    return context.settings.seed + 1000 * number


def run_fingerprint(name: str, settings: TrainSettings, pretrained: Pretrained) -> dict[str, Any]:
    """Return settings, protocol and checkpoint as a flat dict. Training resumes only if they are the same."""
    flat: dict[str, Any] = {
        "protocol": name,
        "checkpoint": f"{pretrained.checkpoint.name} {file_digest(pretrained.checkpoint)}",
    }

    def put(prefix: str, fields: Mapping[str, Any]) -> None:
        for key, value in fields.items():
            if isinstance(value, Mapping):
                put(f"{prefix}{key}.", value)
            elif f"{prefix}{key}" not in flat:
                flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | None) else str(value)

    put("", asdict(settings))
    return flat


class Runner(NamedTuple):
    """Training and tables of a protocol."""

    run: Callable[[RunContext, Any, StopFlag], dict[str, Any] | None]
    """Function that trains and evaluates on this process's share. Returns None where the stop flag ended it early;
    raises ConfigError and ShardError."""
    tables: Callable[[dict[str, Any]], list[ResultTable]]
    """Function that returns a result as tables."""

"""What a protocol is worked at with: settings, what was pretrained, tasks opened where a training left them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dali_pipelines.crops import Crops
from dali_pipelines.endless import StateError
from iwm.config import ConfigError
from iwm.downstream import state
from iwm.downstream.classification import Classification, Column, Task
from iwm.downstream.kept import KeptFeatures
from iwm.downstream.mixing import Mixing
from iwm.downstream.pretrained import Pretrained
from iwm.downstream.settings import Training
from iwm.downstream.study import FrozenEncoders
from iwm.training.distributed import World, loader_threads
from iwm.training.session import MAY_RESTART, split_batch
from iwm.training.whole_file import fingerprint

TaskT = TypeVar("TaskT", bound=Task)


@dataclass(frozen=True)
class Bench:
    """What a protocol is worked at with: the settings, what was pretrained, and where."""

    name: str
    settings: Training
    pretrained: Pretrained
    here: World
    output: Path
    """RUN/eval/NAME.json; the training lies in the folder beside it."""
    micro_batch: int
    """Images of a pass of this process, of each task. Before micro_batch.fit: as asked for, or the whole share."""
    accumulation: int
    last: dict[str, Any] | None
    """The training to go on with."""
    identity: dict[str, Any] = field(repr=False)

    @property
    def folder(self) -> Path:
        """RUN/eval/NAME."""
        return self.output.with_suffix("")

    @property
    def compiled(self) -> bool:
        """Whether encoders and predictors are compiled."""
        return self.settings.compile == "yes" or (self.settings.compile == "auto" and self.here.device.type == "cuda")


def open_bench(name: str, settings: Training, pretrained: Pretrained, output: Path, here: World) -> Bench:
    """What was trained before, if anything, and how a step's images are shared. Frozen encoders are compiled from here
    on, if anything is.

    Raises ConfigError and CheckpointError for what the user can mend.
    """
    micro_batch, accumulation = split_batch(settings.batch, settings.micro_batch, here.size, "--")
    identity = identity_of(name, settings, pretrained)
    last = state.read_last(output.with_suffix(""), identity, here.device)
    bench = Bench(name, settings, pretrained, here, output, micro_batch, accumulation, last, identity)
    for encoder in pretrained.encoders.values():
        encoder.prepare(here.device, compiled=bench.compiled, attention=pretrained.attention)
    return bench


def column_of(bench: Bench, label: str | None = None, name: str | None = None) -> Column:
    """The label column that --data names, as the task `name`."""
    data, pretrained = bench.settings.data, bench.pretrained
    label = label or data.label
    return Column(
        name=name or label,
        shards=pretrained.shards,
        train=pretrained.train,
        val=pretrained.val,
        label=label,
        size=pretrained.size,
    )


def open_task(
    bench: Bench,
    column: Column,
    crops: Crops,
    mixing: Mixing,
    kept: FrozenEncoders | None,
    *,
    number: int = 0,
) -> Classification | KeptFeatures:
    """A column as task `number`: its crops, or the features that `kept` computes of its centre crops, once.

    It goes on where the training left it. A state of other processes or another device begins a new epoch.
    """
    loading = loading_of(bench)
    if kept is not None:
        return KeptFeatures(
            column,
            kept,
            batch_size=bench.micro_batch,
            smoothing=mixing.smoothing,
            seed=_seed(bench, number),
            here=bench.here,
            loading=loading,
            bf16=bench.pretrained.bf16,
        )

    def opened(seed: int, state: dict[str, Any] | None) -> Classification:
        return Classification(
            column,
            crops,
            mixing,
            batch_size=bench.micro_batch,
            seed=seed,
            here=bench.here,
            loading=loading,
            state=state,
        )

    return where_left(bench, number, opened)


def loading_of(bench: Bench) -> dict[str, Any]:
    """Arguments that all loaders of this process have in common."""
    data, here = bench.settings.data, bench.here
    return {
        "device": here.device,
        "rank": here.rank,
        "world_size": here.size,
        "threads": data.threads or loader_threads(here.device, here.local_size),
        "prefetch": data.prefetch,
    }


def where_left(bench: Bench, number: int, opened: Callable[[int, dict[str, Any] | None], TaskT]) -> TaskT:
    """Open task `number`, of a seed and a loader's state, where the training left it.

    A state of other processes or another device begins a new epoch, in a new order.
    """
    seed = _seed(bench, number)
    if bench.last is None:
        return opened(seed, None)
    ranks = bench.last["ranks"]
    state = ranks[bench.here.rank if bench.here.rank < len(ranks) else 0]["tasks"][number]
    try:
        return opened(state["seed"], state)
    except StateError as error:
        if not error.different <= MAY_RESTART:
            raise ConfigError(
                f"{bench.folder} holds a training on other data ({', '.join(sorted(error.different))} changed); delete "
                "the folder, or choose another --output"
            ) from error
        return opened(seed + bench.last["progress"]["step"], None)


def _seed(bench: Bench, number: int) -> int:
    """Of a task's order and augmentations."""
    return bench.settings.seed + 1000 * number


def identity_of(name: str, settings: Training, pretrained: Pretrained) -> dict[str, Any]:
    """Flat settings, protocol and checkpoint: a training goes on only where they are the same."""
    flat: dict[str, Any] = {
        "protocol": name,
        "checkpoint": f"{pretrained.checkpoint.name} {fingerprint(pretrained.checkpoint)}",
    }

    def put(prefix: str, fields: Mapping[str, Any]) -> None:
        for key, value in fields.items():
            if isinstance(value, Mapping):
                put(f"{prefix}{key}.", value)
            elif f"{prefix}{key}" not in flat:
                flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | None) else str(value)

    put("", asdict(settings))
    return flat

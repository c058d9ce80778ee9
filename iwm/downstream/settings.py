"""The options of every protocol that trains: encoder, data, length, optimiser, and what is written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeVar

from dali_pipelines.augmentation import AugmentationError
from dali_pipelines.crops import Crops
from dali_pipelines.segmentation import MaskCrops
from iwm.config import ConfigError
from iwm.evaluation.settings import HeldOut
from iwm.evaluation.settings import Settings as Common
from shards.listing import LABEL

if TYPE_CHECKING:
    from iwm.downstream.pretrained import Pretrained

CropsT = TypeVar("CropsT", Crops, MaskCrops)


@dataclass(frozen=True)
class Foreign:
    """An encoder that others published (iwm.models.foreign), as --checkpoint FILE --foreign.kind mae."""

    kind: Literal["mae", "ijepa", "moco_v3", "dino", "ibot", "timm"] | None = None
    """What the file is; None: a run or a checkpoint of this trainer."""
    name: str | None = None
    """Of timm's ViT, for kind timm."""
    image_size: int = 224
    """Side of its images in pixels; positions are interpolated where it was trained at another size."""


@dataclass(frozen=True)
class Images(HeldOut):
    """Labelled images: a split to learn from, and the held-out split that is judged (`split`)."""

    train: str | None = None
    """Split that is learnt from; default: the run's own (data.train), `train` for other encoders."""
    label: str = LABEL
    """Label column of the shards."""
    threads: int = 0
    """CPU threads of each process's pipeline; 0: the cores that may be used, shared by the machine's processes, less
    two for torch's operators where the model is on a GPU."""
    prefetch: int = 2
    """Batches prepared ahead."""


@dataclass(frozen=True)
class Training(Common):
    """What protocols that train have in common. Training goes on from where it was cut when the command is repeated."""

    data: Images = field(default_factory=Images)
    foreign: Foreign = field(default_factory=Foreign)
    epochs: float = 90.0
    steps: int | None = None
    """Optimiser steps in all; replaces epochs, with the warm-up's share of the training unchanged."""
    warmup_epochs: float = 0.0
    """The learning rate rises linearly from zero for so long."""
    batch: int = 1024
    """Images per optimiser step, over all processes; learning rates are those of this batch and are not scaled."""
    micro_batch: int | None = None
    """Most images per process in one pass; the rest is accumulated. None: on a GPU as many as its free memory holds,
    measured before training; on a CPU the whole share of a process."""
    weight_decay: float = 0.0
    threads: int = 0
    """Threads of torch's CPU operators in each process; 0: as the run was trained, with a GPU 2."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """torch.compile of each block; `auto`: on a GPU."""
    validate_every: float = 5.0
    """Epochs between two looks at the held-out images; the last epoch always has one. The best of them is kept."""
    checkpoint_every: int = 1000
    """Optimiser steps between two writings of what is needed to go on."""
    log_every: int = 50
    """Optimiser steps between two lines of metrics.jsonl; the device is read only then."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard."""

    def check(self) -> None:
        """Raise ConfigError, naming the option, where fields make no sense."""
        need(self.epochs > 0, f"--epochs {self.epochs} must be positive")
        need(self.steps is None or self.steps >= 1, f"--steps {self.steps} must be positive (or None, for epochs)")
        need(
            0 <= self.warmup_epochs < self.epochs,
            f"--warmup-epochs {self.warmup_epochs} must be below --epochs {self.epochs}",
        )
        need(self.batch >= 1, f"--batch {self.batch} must be positive")
        need(self.micro_batch is None or self.micro_batch >= 1, f"--micro-batch {self.micro_batch} must be positive")
        need(self.weight_decay >= 0, f"--weight-decay {self.weight_decay} must not be negative")
        need(self.validate_every > 0, f"--validate-every {self.validate_every} must be positive")
        need(min(self.checkpoint_every, self.log_every) >= 1, "--checkpoint-every and --log-every must be positive")
        need(self.seed >= 0, f"--seed {self.seed} must not be negative")
        need(min(self.threads, self.data.threads) >= 0, "--threads and --data.threads must not be negative")
        need(self.data.prefetch >= 1, f"--data.prefetch {self.data.prefetch} must be positive")
        need(
            self.output is None or self.output.suffix == ".json",
            f"--output {self.output} must end in .json: the training lies in the folder of the name before that",
        )


def need(holds: bool, problem: str) -> None:
    """Raise ConfigError where something does not hold."""
    if not holds:
        raise ConfigError(problem)


def need_rates(option: str, rates: Sequence[float]) -> None:
    """Raise ConfigError where an option's learning rates are none, not above 0, or twice the same."""
    need(len(rates) > 0 and all(0 < rate < math.inf for rate in rates), f"{option}: learning rates above 0")
    need_each_once(option, rates)


def need_each_once(option: str, chosen: Sequence[object]) -> None:
    """Raise ConfigError where an option, of whose values each is an arm, has none or one twice."""
    need(len(chosen) > 0 and len(set(chosen)) == len(chosen), f"{option}: at least one, each once")


def need_seeds(seeds: Sequence[int]) -> None:
    """Raise ConfigError where --seeds are none, negative, or twice the same."""
    need(
        len(seeds) > 0 and len(set(seeds)) == len(seeds) and min(seeds) >= 0,
        "--seeds: at least one, each once, from 0 on",
    )


def need_drop_path(rate: float) -> None:
    """Raise ConfigError where --drop-path is none."""
    need(0 <= rate < 1, f"--drop-path {rate} must be from 0 to below 1")


def need_share(option: str, share: float) -> None:
    """Raise ConfigError where an option is no share of a learning rate."""
    need(0 <= share < math.inf, f"{option} {share} must not be negative")


def need_layer_decay(decay: float) -> None:
    """Raise ConfigError where --layer-decay is none."""
    need(0 < decay <= 1, f"--layer-decay {decay} must be above 0 and at most 1 (which is none)")


def crops_of(crops: CropsT, pretrained: Pretrained) -> CropsT:
    """The crops of a protocol, at the encoder's image size.

    Raises ConfigError for ones that cannot be made, or that are asked for at another size.
    """
    try:
        crops.check()
    except AugmentationError as error:
        raise ConfigError(f"--crops: {error}") from error
    need(
        crops.size in (type(crops).size, pretrained.size),
        f"--crops.size {crops.size}: images are shown at the encoder's size, {pretrained.size} px; leave it out",
    )
    return replace(crops, size=pretrained.size)

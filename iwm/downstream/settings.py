"""Options that all downstream protocols share: encoder, data, length, optimiser, logging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeVar

from dali_pipelines.augmentations import AugmentationError
from dali_pipelines.crops import CropSettings, SegmentationCrops
from iwm.config import ConfigError
from iwm.encoder_outputs import EncoderName
from iwm.evaluation.settings import EvalData, EvalSettings
from iwm.ranges import Range, check_ranges
from shards.listing import LABEL

CropsT = TypeVar("CropsT", CropSettings, SegmentationCrops)

LEARNING_RATE = Range(above=0, below=math.inf)


@dataclass(frozen=True)
class ExternalModel:
    """Published encoder of another project, for example --checkpoint FILE --external.format mae."""

    format: Literal["mae", "ijepa", "moco_v3", "dino", "ibot", "timm"] | None = None
    """Format of the file; None: a run or a checkpoint of this trainer."""
    name: str | None = None
    """Name of timm's ViT, for --external.format timm."""
    image_size: Annotated[int, Range(min=1)] = 224
    """Side of input images in pixels. Positions are interpolated where the encoder was trained at another size."""
    heads: Annotated[int | None, Range(min=1)] = None
    """Number of attention heads of the encoder, for files of a width that was never published (not with timm)."""
    predictor_heads: Annotated[int | None, Range(min=1)] = None
    """Number of heads of MAE's decoder or I-JEPA's predictor.
    None: as published for MAE's width; as many as I-JEPA's encoder has."""


@dataclass(frozen=True)
class DataSettings(EvalData):
    """Labelled images: a training split (`train`) and a held-out split (`split`)."""

    split: str | None = None
    """Held-out split. Default: the run's validation split (data.val); `val` where it has none."""
    train: str | None = None
    """Training split. Default: the run's own (data.train); `train` for external encoders."""
    label: str = LABEL
    """Label column of the shards."""
    num_threads: Annotated[int, Range(min=0)] = 0
    """CPU threads of each process's pipeline.
    0: the process's share of the available cores, less two for torch's operators where the model is on a GPU."""
    prefetch_queue_depth: Annotated[int, Range(min=1)] = 2
    """Batches prepared ahead."""


@dataclass(frozen=True)
class TrainSettings(EvalSettings):
    """Options of all protocols that train. Rerun the same command to resume an interrupted training."""

    data: DataSettings = field(default_factory=DataSettings)
    seed: Annotated[int, Range(min=0)] = 0
    """Seed of the sample order, the augmentations and the heads of probes.
    In protocols with `--seeds`, that option seeds heads and random predictors."""
    external: ExternalModel = field(default_factory=ExternalModel)
    encoder: tuple[EncoderName, ...] = ("teacher",)
    """Encoders: `teacher` (EMA target encoder), `student` (context encoder). Several are trials of their own."""
    lr: Annotated[tuple[float, ...], LEARNING_RATE] = ()
    """Peak learning rates. Several are a sweep: a trial for each."""
    selection: Literal["train", "val"] = "train"
    """Images by which the best trial of a sweep and its best epoch are chosen.
    `train`: training images that are held out from training. `val`: those of the held-out split, which are reported.
    With `train` and one learning rate nothing is chosen: all training images are trained on.
    The last epoch of the first trial is then the best one."""
    selection_share: Annotated[float, Range(above=0, below=1)] = 0.05
    """Share of the training images that --selection train holds out."""
    epochs: Annotated[float, Range(above=0)] = 90.0
    """Length of training (epochs)."""
    steps: Annotated[int | None, Range(min=1)] = None
    """Optimiser steps in total, instead of --epochs. The warm-up is scaled in proportion."""
    warmup_epochs: Annotated[float, Range(min=0)] = 0.0
    """Length of the linear warm-up of the learning rate from zero (epochs)."""
    batch_size: Annotated[int, Range(min=1)] = 1024
    """Images per optimiser step, over all processes. Learning rates are not scaled with the batch size."""
    micro_batch_size: Annotated[int | None, Range(min=1)] = None
    """Images per process in one pass; gradients are accumulated over passes.
    None: on a GPU, as many as fit into its free memory, which is measured before training.
    On a CPU: the process's whole share of the batch, in one pass."""
    weight_decay: Annotated[float, Range(min=0)] = 0.0
    """Weight decay of the optimiser."""
    num_threads: Annotated[int, Range(min=0)] = 0
    """Threads of torch's CPU operators in each process. 0: as in the run's training; 2 with a GPU."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile each block with torch.compile. `auto`: only on a GPU."""
    validate_every: Annotated[float, Range(above=0)] = 5.0
    """Interval of evaluation on the held-out images (epochs). The last epoch is always evaluated.
    The parameters of the best evaluation are saved."""
    checkpoint_every: Annotated[int, Range(min=1)] = 1000
    """Interval of checkpoints to resume from (optimiser steps)."""
    log_every: Annotated[int, Range(min=1)] = 50
    """Interval of lines in metrics.jsonl (optimiser steps). On a GPU a line is written a few steps later."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard."""

    def check(self) -> None:
        """Raise ConfigError, naming the option, where a value is out of range or options contradict each other."""
        check_ranges(self)
        require_unique("--lr", self.lr)
        require_unique("--encoder", self.encoder)
        require(
            self.warmup_epochs < self.epochs,
            f"--warmup-epochs {self.warmup_epochs} must be below --epochs {self.epochs}",
        )
        require(
            self.output is None or self.output.suffix == ".json",
            f"--output {self.output} must end in .json; the training is written to the folder of that name "
            "without .json",
        )


def require(holds: bool, problem: str) -> None:
    """Raise ConfigError with `problem` unless the condition holds."""
    if not holds:
        raise ConfigError(problem)


def require_unique(option: str, values: Sequence[object]) -> None:
    """Raise ConfigError where an option with a trial per value has no value, or the same value twice."""
    require(len(values) > 0 and len(set(values)) == len(values), f"{option}: give at least one value, each only once")


def sized_crops(crops: CropsT, img_size: int) -> CropsT:
    """Return the crops at the encoder's image size. Raises ConfigError for invalid crops or another size."""
    try:
        crops.check()
    except AugmentationError as error:
        raise ConfigError(f"--crops: {error}") from error
    require(
        crops.size in (type(crops).size, img_size),
        f"--crops.size {crops.size}: crops have the encoder's image size, {img_size} px; omit this option",
    )
    return replace(crops, size=img_size)


@dataclass(frozen=True)
class MixupSettings:
    """Probabilities and strengths for finetuning (A.2). 0 disables the augmentation."""

    random_erasing: Annotated[float, Range(min=0, max=1)] = 0.25
    """Probability that a box of 2 to 33% of an image's area is replaced by noise, pixel by pixel."""
    mixup: Annotated[float, Range(min=0)] = 0.8
    """Alpha of the beta distribution from which the blending weight of mixup is sampled."""
    cutmix: Annotated[float, Range(min=0)] = 1.0
    """Alpha of the beta distribution from which the area that cutmix does not replace is sampled.
    Where mixup is on too, each batch has one of the two, with equal probability."""
    label_smoothing: Annotated[float, Range(min=0, below=1)] = 0.1
    """Share of the target that is distributed evenly over all classes (0 to 1)."""

    @classmethod
    def none(cls) -> MixupSettings:
        """Return settings that change nothing, as for probes."""
        return cls(0.0, 0.0, 0.0, 0.0)

    @property
    def mixes(self) -> bool:
        """True where images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

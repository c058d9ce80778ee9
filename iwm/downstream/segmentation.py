"""Semantic segmentation (paper, A.2, table 6): UPerNet on the last four layers of encoder, predictor, or end to end.

Training uses crops at the encoder's image size; evaluation uses whole images at their own size. Several learning rates
are trained at once, because the paper chose the best of three.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Annotated, Any, Literal

import torch
from torch import nn

from dali_pipelines.pipelines import SegmentationCrops
from iwm.config import PredictorConfig
from iwm.downstream.context import Command, RunContext, loading_of, resume_task
from iwm.downstream.cost import dummy_masked_batch
from iwm.downstream.experiment import TrialSpec, best_note, run_trials, trial_name
from iwm.downstream.finetuning import PredictorInit, predictor_of
from iwm.downstream.optim import adamw
from iwm.downstream.segmentation_task import SegmentationTask
from iwm.downstream.settings import (
    LEARNING_RATE,
    TrainSettings,
    require,
    require_unique,
    sized_crops,
)
from iwm.downstream.study import FrozenEncoders
from iwm.downstream.trials import Segmenter
from iwm.evaluation.result_table import ResultTable
from iwm.models.heads import UPerNet
from iwm.models.predictor_backbone import PredictorBackbone
from iwm.models.world_model import EncoderName
from iwm.ranges import Range
from iwm.training.runtime import StopFlag

Part = Literal["encoder", "predictor", "end-to-end"]


@dataclass(frozen=True)
class SegmentationSettings(TrainSettings):
    """Train UPerNet for semantic segmentation on shards with masks (ADE20k: docs/datasets.md)."""

    parts: tuple[Part, ...] = ("predictor",)
    """Trained parts below the head: the encoder, the predictor on the frozen encoder, or both."""
    classes: Annotated[int, Range(min=2, max=255)] = 150
    """Number of classes (2 to 255, the range of 8-bit masks); default: ADE20k's."""
    reduce_zero_label: bool = True
    """Ignore pixels of mask id 0 and take ids 1 to `classes` as the classes, as in ADE20k. Otherwise ids 0 to
    `classes` - 1 are the classes, and 255 is ignored."""
    predictors: tuple[PredictorInit, ...] | None = None
    """Predictors to train. Default: `pretrained`; `random` for an encoder without a predictor."""
    features: EncoderName = "teacher"
    """Encoder: `teacher` (EMA target encoder) or `student` (context encoder)."""
    lrs: Annotated[tuple[float, ...], LEARNING_RATE] = (1e-5, 2e-5, 3e-5)
    """Peak learning rates, one trial each."""
    seeds: Annotated[tuple[int, ...], Range(min=0)] = (0,)
    """Seeds of the parameters that are not pretrained (heads, random predictors). Each seed is a trial; all trials see
    the same batches."""
    drop_path: Annotated[float, Range(min=0, below=1)] = 0.0
    """Drop path rate of the trained parts below the head."""
    activation_checkpointing: bool = False
    """Store only the inputs of trained blocks, and recompute the blocks in the backward pass. This saves memory."""
    channels: Annotated[int, Range(min=1)] = 512
    """Channels inside UPerNet."""
    crops: SegmentationCrops = field(default_factory=SegmentationCrops)
    """Crops and augmentations of training images. `size` is the encoder's image size; `ignore_index` follows from
    --reduce-zero-label."""
    random_predictor: PredictorConfig = field(default_factory=lambda: PredictorConfig(embed_dim=384, depth=12))
    """Shape of the random predictor for an encoder without a predictor."""
    steps: int | None = 160_000
    epochs: float = 127.0
    """Length of training (epochs), only with --steps None. Default: about 160,000 steps of 16 images on ADE20k."""
    validate_every: float = 12.7
    weight_decay: float = 0.01
    batch_size: int = 16

    def check(self) -> None:
        super().check()
        require(
            self.steps is None or self.epochs == SegmentationSettings.epochs,
            f"--epochs {self.epochs:g}: --steps {self.steps} sets the length; use --steps None too",
        )
        require_unique("--parts", self.parts)
        if self.predictors is not None:
            require_unique("--predictors", self.predictors)
        require_unique("--lrs", self.lrs)
        require_unique("--seeds", self.seeds)


def run_segmentation(context: RunContext, settings: SegmentationSettings, stop: StopFlag) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    pretrained, dist = context.pretrained, context.dist
    encoder = pretrained.encoder(settings.features)
    crops = replace(
        sized_crops(settings.crops, pretrained.img_size), ignore_index=0 if settings.reduce_zero_label else 255
    )

    def open_tasks(fitted: RunContext) -> list[SegmentationTask]:
        def open_with(seed: int, state: dict[str, Any] | None) -> SegmentationTask:
            return SegmentationTask(
                pretrained.shards,
                pretrained.train,
                pretrained.val,
                crops,
                classes=settings.classes,
                reduce_zero_label=settings.reduce_zero_label,
                patch=encoder.patch_size,
                batch_size=fitted.micro_batch,
                seed=seed,
                dist=dist,
                loading=loading_of(fitted),
                state=state,
            )

        return [resume_task(fitted, 0, open_with)]

    default: PredictorInit = "pretrained" if pretrained.predictor is not None else "random"
    kinds: tuple[PredictorInit, ...] = settings.predictors or (default,)
    checkpointing = settings.activation_checkpointing
    specs = {}
    for part, lr, seed in product(settings.parts, settings.lrs, settings.seeds):
        for kind in (None,) if part == "encoder" else kinds:
            torch.manual_seed(seed)
            backbone = None
            if part != "predictor":
                backbone = encoder.finetune_copy(drop_path=settings.drop_path, checkpointing=checkpointing)
            predictor_backbone = None
            if kind is not None:
                predictor = predictor_of(pretrained, kind, seed, settings.random_predictor)
                predictor_backbone = PredictorBackbone(
                    predictor, drop_path=settings.drop_path, checkpointing=checkpointing, return_layers_only=True
                )
            width = encoder.embed_dim if predictor_backbone is None else predictor_backbone.predictor_dim
            torch.manual_seed(seed)
            head = UPerNet(width, settings.classes, channels=settings.channels)
            trial: nn.Module = Segmenter(
                head,
                encoder.patch_size,
                backbone=backbone,
                predictor_backbone=predictor_backbone,
                features=settings.features,
                num_prefix_tokens=encoder.num_prefix_tokens,
            )
            if dist.size > 1 and dist.device.type == "cuda":
                trial = nn.SyncBatchNorm.convert_sync_batchnorm(trial)
            assert isinstance(trial, Segmenter)
            trial.to(dist.device)
            metadata = {"part": part, "lr": lr, "seed": seed, "features": settings.features, "predictor": kind}
            words = [part, *([kind] if kind and len(kinds) > 1 else []), f"lr {lr:g}"]
            words += [f"seed {seed}"] if len(settings.seeds) > 1 else []
            specs[", ".join(words)] = TrialSpec(trial, adamw(trial, lr, settings.weight_decay), metadata)
    frozen = FrozenEncoders({settings.features: encoder} if "predictor" in settings.parts else {})
    return run_trials(
        context,
        open_tasks,
        specs,
        frozen,
        stop,
        example=dummy_masked_batch(pretrained, dist.device),
        shape="linear",
        best_metadata={"classes": settings.classes},
    )


def segmentation_tables(result: dict[str, Any]) -> list[ResultTable]:
    """Return a table of segmentation: last step's mIoU and pixel accuracy, best epoch, parameters of every trial."""
    rows = [
        [
            trial_name(result, name),
            f"{100 * trial['miou']['mean']:.1f}",
            f"{100 * trial['pixel_accuracy']['mean']:.1f}",
            f"{100 * trial['best']['score']:.1f} at {trial['best']['epoch']:.4g}",
            f"{trial['parameters']:,}",
        ]
        for name, trial in result["trials"].items()
    ]
    caption = (
        f"{result['classes']} classes, {result['train_images']:,} training images, {result['steps']:,} steps of "
        f"{result['batch_size']}; {result['val_images']:,} held-out images{best_note(result)}."
    )
    title = "Segmentation: mIoU of the last step, whole images"
    return [ResultTable(title, ["", "mIoU %", "pixels %", "best", "parameters"], rows, caption)]


SEGMENTATION = Command(SegmentationSettings, run_segmentation, segmentation_tables)

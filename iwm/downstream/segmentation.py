"""Semantic segmentation (paper, A.2, table 6): UPerNet on the last four layers of encoder, predictor, or end to end.

Training uses crops at the encoder's image size; evaluation uses whole images at their own size. Several learning rates
are trained at once, because the paper chose the best of three.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from iwm.downstream.context import RunContext, Runner, loading_of, resume_task, training_parts
from iwm.downstream.cost import dummy_masked_batch
from iwm.downstream.experiment import TrialSpec, run_trials, selection_note, trial_name, varied
from iwm.downstream.finetuning import predictor_of
from iwm.downstream.optim import adamw
from iwm.downstream.protocol_settings import PredictorInit, SegmentationSettings
from iwm.downstream.segmentation_task import SegmentationTask
from iwm.downstream.settings import sized_crops
from iwm.downstream.study import FrozenEncoders
from iwm.downstream.trials import Segmenter
from iwm.evaluation.held_out import require_splits
from iwm.evaluation.result_table import ResultTable
from iwm.models.heads import UPerNet
from iwm.models.predictor_backbone import PredictorBackbone
from iwm.training.runtime import StopFlag


def run_segmentation(context: RunContext, settings: SegmentationSettings, stop: StopFlag) -> dict[str, Any] | None:
    """Train and evaluate. Return None where the stop flag ended it early. Raises ConfigError and ShardError."""
    pretrained, dist = context.pretrained, context.dist
    require_splits(pretrained.shards, pretrained.train, pretrained.val, "--data.train")
    patch = pretrained.teacher.patch_size
    crops = replace(
        sized_crops(settings.crops, pretrained.img_size), ignore_index=0 if settings.reduce_zero_label else 255
    )

    def open_tasks(fitted: RunContext) -> list[SegmentationTask]:
        parts = training_parts(fitted, pretrained.shards, pretrained.train)

        def open_with(seed: int, state: dict[str, Any] | None) -> SegmentationTask:
            return SegmentationTask(
                pretrained.shards,
                pretrained.train,
                pretrained.val,
                crops,
                classes=settings.classes,
                reduce_zero_label=settings.reduce_zero_label,
                patch=patch,
                batch_size=fitted.micro_batch,
                seed=seed,
                dist=dist,
                loading=loading_of(fitted),
                parts=parts,
                state=state,
            )

        return [resume_task(fitted, 0, open_with)]

    default: PredictorInit = "pretrained" if pretrained.predictor is not None else "random"
    kinds: tuple[PredictorInit, ...] = settings.predictors or (default,)
    recompute = settings.activation_checkpointing
    specs = {}
    for part, features, lr, seed in product(settings.parts, settings.encoder, settings.lr, settings.seeds):
        encoder = pretrained.encoder(features)
        part_kinds: tuple[PredictorInit | None, ...] = (None,) if part == "encoder" else kinds
        for kind in part_kinds:
            torch.manual_seed(seed)
            backbone = None
            if part != "predictor":
                backbone = encoder.finetune_copy(drop_path=settings.drop_path, grad_checkpointing=recompute)
            predictor_backbone = None
            if kind is not None:
                predictor = predictor_of(pretrained, kind, seed, settings.random_predictor)
                predictor_backbone = PredictorBackbone(
                    predictor,
                    drop_path=settings.drop_path,
                    grad_checkpointing=recompute,
                    return_layers_only=True,
                )
            width = encoder.embed_dim if predictor_backbone is None else predictor_backbone.predictor_dim
            torch.manual_seed(seed)
            head = UPerNet(width, settings.classes, channels=settings.channels, layer_norm=settings.layer_norm)
            trial: nn.Module = Segmenter(
                head,
                patch,
                backbone=backbone,
                predictor_backbone=predictor_backbone,
                features=features,
                num_prefix_tokens=encoder.num_prefix_tokens,
            )
            if dist.size > 1 and dist.device.type == "cuda":
                trial = nn.SyncBatchNorm.convert_sync_batchnorm(trial)
            assert isinstance(trial, Segmenter)
            trial.to(dist.device)
            metadata = {"part": part, "lr": lr, "seed": seed, "features": features, "predictor": kind}
            words: list[str] = [part, *varied((f"{kind}", part_kinds), (features, settings.encoder))]
            words += [f"lr {lr:g}", *varied((f"seed {seed}", settings.seeds))]
            specs[", ".join(words)] = TrialSpec(trial, adamw(trial, lr, settings.weight_decay), metadata)
    frozen_names = settings.encoder if "predictor" in settings.parts else ()
    frozen = FrozenEncoders({name: pretrained.encoder(name) for name in frozen_names})
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
        f"{result['batch_size']}; {result['val_images']:,} held-out images. {selection_note(result)}"
    )
    title = "Segmentation: mIoU of the last step, whole images"
    return [ResultTable(title, ["", "mIoU %", "pixels %", "best", "parameters"], rows, caption)]


SEGMENTATION = Runner(run_segmentation, segmentation_tables)

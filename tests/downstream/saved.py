"""Bytes that autograd saves for the backward passes of several trials, as a table.

The script python -m tests.downstream.saved DEPTH prints MiB per image (float32) of 1, 2, 4 and 8 trials that finetune
the predictor or the encoder: a ViT-B/16 at 224 px and a predictor of width 384 with DEPTH blocks.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dali_pipelines.views import Views
from iwm.config import Config
from iwm.downstream import trainer
from iwm.downstream.optim import adamw
from iwm.downstream.progress import TrainPlan
from iwm.downstream.study import FrozenEncoders, Study, Trial
from iwm.downstream.trials import FinetunedEncoder, FinetunedPredictor
from iwm.model_config import EncoderConfig, PredictorConfig
from iwm.models.attention import to_device
from iwm.models.backbone import frozen_backbone
from iwm.models.heads import AttentiveHead, LinearHead
from iwm.models.predictor_backbone import PredictorBackbone, copy_pretrained
from iwm.models.world_model import WorldModel
from iwm.recipes import demo
from iwm.training.metric_window import MetricWindow
from tests.training.runs import alone

CLASSES = 10


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the distinct storages that autograd saves at the same time, without parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.now = self.peak = 0
        self._kept: dict[int, int] = {}
        self._own = {each.untyped_storage()._cdata for each in (*module.parameters(), *module.buffers())}
        super().__init__(self._pack, lambda saved_tensor: saved_tensor.tensor)

    def _pack(self, tensor: Tensor) -> _Held:
        saved_tensor, place = _Held(tensor), tensor.untyped_storage()._cdata
        if place not in self._own:
            if not self._kept.get(place):
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
            self._kept[place] = self._kept.get(place, 0) + 1
            weakref.finalize(saved_tensor, self._dropped, place, tensor.untyped_storage().nbytes())
        return saved_tensor

    def _dropped(self, place: int, count: int) -> None:
        self._kept[place] -= 1
        if not self._kept[place]:
            self.now -= count


@dataclass
class _Held:
    tensor: Tensor
    __hash__ = object.__hash__


class Given:
    """Task with one batch of images and soft targets."""

    name, metric, proportion_metrics, images = "given", "top1", ("top1",), 1

    def __init__(self, images: int, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator)
        self._targets = torch.full((images, CLASSES), 1 / CLASSES)

    def get_batch(self, pass_index: int) -> tuple[Tensor, Tensor]:
        return self._images, self._targets

    def state(self) -> dict[str, Any]:
        return {}

    def metadata(self) -> dict[str, Any]:
        return {}


def small() -> Config:
    """Return the configuration of a small model at 32 px."""
    return replace(
        demo(),
        encoder=EncoderConfig(embed_dim=32, depth=4, num_heads=2, patch_size=8, init="xavier"),
        predictor=PredictorConfig(embed_dim=32, depth=6, num_heads=2),
    )


def base(depth: int) -> Config:
    """Return the configuration of a ViT-B/16 at 224 px with a predictor of width 384."""
    return replace(
        demo(),
        views=Views(size=224),
        encoder=EncoderConfig(embed_dim=768, depth=12, num_heads=12, patch_size=16),
        predictor=PredictorConfig(embed_dim=384, depth=depth, num_heads=12),
    )


@cache
def _model(config: Config) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(config)


def plan_of(
    config: Config, trials: int, images: int, kind: str = "predictor", grad_checkpointing: bool = False
) -> TrainPlan:
    """Return a plan that finetunes `trials` predictors on a frozen encoder, or (kind `encoder`) `trials` encoders."""
    model = _model(config)
    torch.manual_seed(0)
    teacher, width = frozen_backbone(model.target_encoder), config.encoder.embed_dim

    def new_trial() -> Trial:
        if kind == "encoder":
            return FinetunedEncoder(
                teacher.finetune_copy(drop_path=0.2, grad_checkpointing=grad_checkpointing), LinearHead(width, CLASSES)
            )
        predictor_backbone = PredictorBackbone(
            copy_pretrained(model.predictor), drop_path=0.2, grad_checkpointing=grad_checkpointing
        )
        return FinetunedPredictor(
            predictor_backbone, AttentiveHead(width, config.encoder.num_heads, CLASSES), "teacher", 0
        )

    study = Study(
        {str(trial): new_trial() for trial in range(trials)}, FrozenEncoders({"teacher": teacher}), [0] * trials
    )
    # Fused attention saves no attention weights, as on a GPU.
    to_device(study, torch.device("cpu"), "sdpa")
    return TrainPlan(
        title="saved",
        folder=Path("unused"),
        identity={},
        study=study.train(),
        tasks=[Given(images, config.views.size)],
        task_ids=[(0,)] * trials,
        optimizers=[adamw(trial, 1e-3, 0.1) for trial in study.trials],
        lr_factor=lambda step: 1.0,
        steps=1,
        steps_per_epoch=1.0,
        batch_size=images,
        accumulation=1,
        bf16=False,
        selection="val",
        validate_every=1.0,
        checkpoint_every=1,
        log_every=1,
        tensorboard=False,
    )


def trial_by_trial(plan: TrainPlan) -> None:
    """Compute the gradients of a pass as in training."""
    trainer._pass(plan, list(plan.study.trials), 0, alone(), MetricWindow(torch.device("cpu")))


def all_at_once(plan: TrainPlan) -> None:
    """Compute the same gradients by one backward pass of the sum of all losses."""
    pixels, targets = plan.tasks[0].get_batch(0)
    shared, losses = plan.study.shared_inputs(pixels), []
    for trial in range(len(plan.study.names)):
        plan.study.seed(trial, 0, 0)
        losses.append(plan.study.trial(trial)(shared, [targets]))
    torch.stack(losses).sum().backward()


def saved(plan: TrainPlan, way: Callable[[TrainPlan], None] = trial_by_trial) -> int:
    """Return the peak of the bytes that are saved for backward passes."""
    counted = SavedBytes(plan.study)
    with counted:
        way(plan)
    return counted.peak


if __name__ == "__main__":
    IMAGES, config = 2, base(int(sys.argv[1]))
    for title, way, options in (
        ("all at once", all_at_once, {}),
        ("trial by trial", trial_by_trial, {}),
        ("trial by trial, checkpointing", trial_by_trial, {"grad_checkpointing": True}),
        ("encoders, trial by trial", trial_by_trial, {"kind": "encoder"}),
        (
            "encoders, trial by trial, grad_checkpointing",
            trial_by_trial,
            {"kind": "encoder", "grad_checkpointing": True},
        ),
    ):
        cells = []
        for trials in (1, 2, 4, 8):
            cells.append(f"{saved(plan_of(config, trials, IMAGES, **options), way) / IMAGES / 2**20:,.1f}")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)

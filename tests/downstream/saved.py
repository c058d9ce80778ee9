"""Bytes that passes of several arms keep for their backward passes, as a table.

A script: python -m tests.downstream.saved DEPTH prints, for a ViT-B/16 at 224 px and a predictor of 384 features and
DEPTH blocks, MiB per image of 1, 2, 4 and 8 arms that finetune the predictor or the encoder, in float32.
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

from dali_pipelines.augmentation import Views
from iwm.config import Config, Encoder, Predictor
from iwm.downstream import loop
from iwm.downstream.arms import FinetunedEncoder, FinetunedPredictor
from iwm.downstream.optim import adamw
from iwm.downstream.plan import Plan
from iwm.downstream.study import Arm, FrozenEncoders, Study
from iwm.downstream.window import Window
from iwm.models.attention import settle
from iwm.models.backbone import backbone_of
from iwm.models.heads import AttentiveHead, LinearHead
from iwm.models.reader import Reader, kept
from iwm.models.world_model import WorldModel
from iwm.recipes import demo
from tests.training.runs import alone

CLASSES = 10


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of distinct storages that autograd keeps at the same time, parameters and buffers left out."""

    def __init__(self, module: nn.Module) -> None:
        self.now = self.peak = 0
        self._kept: dict[int, int] = {}
        self._own = {each.untyped_storage()._cdata for each in (*module.parameters(), *module.buffers())}
        super().__init__(self._pack, lambda held: held.tensor)

    def _pack(self, tensor: Tensor) -> _Held:
        held, place = _Held(tensor), tensor.untyped_storage()._cdata
        if place not in self._own:
            if not self._kept.get(place):
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
            self._kept[place] = self._kept.get(place, 0) + 1
            weakref.finalize(held, self._dropped, place, tensor.untyped_storage().nbytes())
        return held

    def _dropped(self, place: int, count: int) -> None:
        self._kept[place] -= 1
        if not self._kept[place]:
            self.now -= count


@dataclass
class _Held:
    tensor: Tensor
    __hash__ = object.__hash__


class Given:
    """A task of one batch of images and soft targets."""

    name, metric, counted, images = "given", "top1", ("top1",), 1

    def __init__(self, images: int, side: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator)
        self._targets = torch.full((images, CLASSES), 1 / CLASSES)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        return self._images, self._targets

    def state(self) -> dict[str, Any]:
        return {}

    def judge(self, *given: Any) -> Any:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        return {}


def small() -> Config:
    """A small model at 32 px."""
    return replace(
        demo(),
        encoder=Encoder(width=32, depth=4, heads=2, patch=8, init="xavier"),
        predictor=Predictor(width=32, depth=6, heads=2),
    )


def base(depth: int) -> Config:
    """A ViT-B/16 at 224 px with a predictor of 384 features."""
    return replace(
        demo(),
        views=Views(size=224),
        encoder=Encoder(width=768, depth=12, heads=12, patch=16),
        predictor=Predictor(width=384, depth=depth, heads=12),
    )


@cache
def _model(config: Config) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(config)


def plan_of(config: Config, arms: int, images: int, kind: str = "predictor", checkpointing: bool = False) -> Plan:
    """Plan to finetune so many predictors on a frozen encoder, or (kind `encoder`) so many encoders."""
    model = _model(config)
    torch.manual_seed(0)
    teacher, width = backbone_of(model.target_encoder), config.encoder.width

    def made() -> Arm:
        if kind == "encoder":
            return FinetunedEncoder(
                teacher.trained(drop_path=0.2, checkpointing=checkpointing), LinearHead(width, CLASSES)
            )
        reader = Reader(kept(model.predictor), drop_path=0.2, checkpointing=checkpointing)
        return FinetunedPredictor(reader, AttentiveHead(width, config.encoder.heads, CLASSES), "teacher", 0)

    study = Study({str(arm): made() for arm in range(arms)}, FrozenEncoders({"teacher": teacher}), [0] * arms)
    # Fused attention keeps no weights of attention, as on a GPU.
    settle(study, torch.device("cpu"), "fused")
    return Plan(
        title="saved",
        folder=Path("unused"),
        identity={},
        study=study.train(),
        tasks=[Given(images, config.views.size)],
        solves=[(0,)] * arms,
        optimizers=[adamw(arm, 1e-3, 0.1) for arm in study.arms],
        rate=lambda step: 1.0,
        steps=1,
        steps_per_epoch=1.0,
        batch=images,
        accumulation=1,
        bf16=False,
        validate_every=1.0,
        checkpoint_every=1,
        log_every=1,
        tensorboard=False,
    )


def arm_by_arm(plan: Plan) -> None:
    """A pass as training makes it."""
    loop._pass(plan, list(plan.study.arms), 0, alone(), Window(len(plan.study.names)))


def all_at_once(plan: Plan) -> None:
    """The same gradients by one backward pass of the sum of all losses."""
    pixels, targets = plan.tasks[0].batch(0)
    shared, losses = plan.study.share(pixels), []
    for arm in range(len(plan.study.names)):
        plan.study.seed(arm, 0, 0)
        losses.append(plan.study.arm(arm)(shared, [targets]))
    torch.stack(losses).sum().backward()


def saved(plan: Plan, way: Callable[[Plan], None] = arm_by_arm) -> int:
    """Peak of the bytes that are kept for backward passes."""
    counted = SavedBytes(plan.study)
    with counted:
        way(plan)
    return counted.peak


if __name__ == "__main__":
    IMAGES, config = 2, base(int(sys.argv[1]))
    for title, way, options in (
        ("all at once", all_at_once, {}),
        ("arm by arm", arm_by_arm, {}),
        ("arm by arm, checkpointing", arm_by_arm, {"checkpointing": True}),
        ("encoders, arm by arm", arm_by_arm, {"kind": "encoder"}),
        ("encoders, arm by arm, checkpointing", arm_by_arm, {"kind": "encoder", "checkpointing": True}),
    ):
        cells = []
        for arms in (1, 2, 4, 8):
            cells.append(f"{saved(plan_of(config, arms, IMAGES, **options), way) / IMAGES / 2**20:,.1f}")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)

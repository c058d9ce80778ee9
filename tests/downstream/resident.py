"""A few steps of four arms on resident batches: in this process, or as one of several under torchrun.

torchrun --nproc_per_node N tests/downstream/resident.py FOLDER ACCUMULATION
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iwm.config import Config, Encoder, Predictor, Train
from iwm.downstream.arms import FinetunedEncoder, FinetunedPredictor, Probe
from iwm.downstream.loop import train
from iwm.downstream.optim import adamw, lars
from iwm.downstream.plan import Plan
from iwm.downstream.study import FrozenEncoders, Study
from iwm.models.backbone import backbone_of
from iwm.models.heads import AttentiveHead, LinearHead
from iwm.models.reader import Reader, kept
from iwm.models.world_model import WorldModel
from iwm.recipes import demo
from iwm.training.distributed import World, world
from iwm.training.signals import StopWish

BATCH, STEPS, CLASSES = 8, 4, 3


class Resident:
    """The same images of a step, shared by processes and passes."""

    name, metric, counted = "resident", "top1", ("top1",)
    images = 2 * BATCH

    def __init__(self, here: World, accumulation: int) -> None:
        self._here, self._accumulation = here, accumulation
        self._size = BATCH // here.size // accumulation

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        images, targets = self._images(number // self._accumulation)
        first = (number % self._accumulation * self._here.size + self._here.rank) * self._size
        return images[first : first + self._size], targets[first : first + self._size]

    def _images(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
        return images, torch.rand(BATCH, CLASSES, generator=generator).softmax(1)

    def state(self) -> dict[str, Any]:
        return {}

    def judge(self, study: Study, number: int, arms: Sequence[int]) -> list[dict[str, Any]]:
        """How far apart processes are in what they say of the same images."""
        said = self._here.gather(study.predict(self._images(99)[0], number, arms))
        return [
            {"top1": 0.0, "apart": max((answers[arm] - said[0][arm]).abs().max().item() for answers in said)}
            for arm in range(len(arms))
        ]

    def facts(self) -> dict[str, Any]:
        return {}


def trajectory(folder: Path, here: World, accumulation: int) -> dict[str, Any]:
    """After STEPS steps: the parameters of a linear probe, a finetuned encoder and a finetuned predictor, and how far
    apart processes are in what these say, an attentive probe, whose batch norm sees a process's images alone, and a
    probe of which nothing is trained."""
    config: Config = replace(
        demo(),
        encoder=Encoder(width=32, depth=2, heads=2, patch=8, init="xavier"),
        predictor=Predictor(width=16, depth=2, heads=2),
    )
    torch.manual_seed(0)
    model = WorldModel(config)
    teacher, student = backbone_of(model.target_encoder), backbone_of(model.encoder)
    probe = Probe(LinearHead(32, CLASSES), "teacher", 0)
    encoder = FinetunedEncoder(student.trained(), LinearHead(32, CLASSES))
    predictor = FinetunedPredictor(Reader(kept(model.predictor)), LinearHead(32, CLASSES), "teacher", 0)
    normed = Probe(AttentiveHead(32, 2, CLASSES), "teacher", 0)
    still = Probe(LinearHead(32, CLASSES), "teacher", 0).requires_grad_(False)
    arms = {"probe": probe, "encoder": encoder, "predictor": predictor, "normed": normed, "still": still}
    plan = Plan(
        title="resident",
        folder=folder,
        identity={},
        study=Study(arms, FrozenEncoders({"teacher": teacher}), seeds=[0] * len(arms)),
        tasks=[Resident(here, accumulation)],
        solves=[(0,)] * len(arms),
        optimizers=[
            lars(probe, 50.0, 0.0),
            adamw(encoder, 1e-2, 0.1),
            adamw(predictor, 1e-2, 0.1),
            adamw(normed, 1e-2, 0.1),
            torch.optim.AdamW([{"params": list(still.parameters()), "peak": 0.0}], fused=True),
        ],
        rate=lambda step: 1.0,
        steps=STEPS,
        steps_per_epoch=2.0,
        batch=BATCH,
        accumulation=accumulation,
        bf16=False,
        validate_every=1.0,
        checkpoint_every=100,
        log_every=1,
        tensorboard=False,
    )
    progress = train(plan, here, StopWish(), None)
    assert progress is not None
    return {
        "state": {name: value for name, value in plan.study.trained().items() if not name.startswith("3.")},
        "apart": [scores["resident"]["apart"] for scores in progress.scores],
    }


if __name__ == "__main__":
    with world(Train(device="cpu")) as here:
        ended = trajectory(Path(sys.argv[1]), here, int(sys.argv[2]))
        if here.main:
            torch.save(ended, Path(sys.argv[1]) / "ended.pt")

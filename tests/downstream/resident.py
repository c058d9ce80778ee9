"""Script: a few steps of five trials on resident batches, in one process or in several under torchrun.

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

from iwm.config import Config
from iwm.downstream.optim import adamw, lars
from iwm.downstream.progress import TrainPlan
from iwm.downstream.study import Evaluated, FrozenEncoders, Study
from iwm.downstream.trainer import train
from iwm.downstream.trials import FinetunedEncoder, FinetunedPredictor, Probe
from iwm.model_config import EncoderConfig, PredictorConfig
from iwm.models.backbone import frozen_backbone
from iwm.models.heads import AttentiveHead, LinearHead
from iwm.models.predictor_backbone import PredictorBackbone, copy_pretrained
from iwm.models.world_model import WorldModel
from iwm.recipes import demo
from iwm.train_config import TrainConfig
from iwm.training.distributed import DistEnv, init_distributed
from iwm.training.runtime import StopFlag

BATCH, STEPS, CLASSES = 8, 4, 3


class Resident:
    """Task whose images of a step are the same however they are split over processes and passes."""

    name, metric, proportion_metrics = "resident", "top1", ("top1",)
    images = 2 * BATCH

    def __init__(self, dist: DistEnv, accumulation: int) -> None:
        self._dist, self._accumulation = dist, accumulation
        self._size = BATCH // dist.size // accumulation

    def get_batch(self, pass_index: int) -> tuple[Tensor, Tensor]:
        images, targets = self._images(pass_index // self._accumulation)
        first = (pass_index % self._accumulation * self._dist.size + self._dist.rank) * self._size
        return images[first : first + self._size], targets[first : first + self._size]

    def _images(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8, generator=generator)
        return images, torch.rand(BATCH, CLASSES, generator=generator).softmax(1)

    def state(self) -> dict[str, Any]:
        return {}

    def evaluate(
        self, study: Study, task_index: int, trials: Sequence[int], images: Evaluated = "val"
    ) -> list[dict[str, Any]]:
        """Return the largest difference between the processes' logits of the same images (`apart`)."""
        predictions = self._dist.all_gather(study.predict(self._images(99)[0], task_index, trials))
        return [
            {"top1": 0.0, "apart": max((p[trial] - predictions[0][trial]).abs().max().item() for p in predictions)}
            for trial in range(len(trials))
        ]

    def metadata(self) -> dict[str, Any]:
        return {}


def trajectory(folder: Path, dist: DistEnv, accumulation: int) -> dict[str, Any]:
    """Return the parameters after STEPS steps, and the difference between the processes' logits.

    Trials: a linear probe, a finetuned encoder, a finetuned predictor, an attentive probe (its batch norm sees only the
    images of its process, so its parameters are not returned), and a probe without trained parameters.
    """
    config: Config = replace(
        demo(),
        encoder=EncoderConfig(embed_dim=32, depth=2, num_heads=2, patch_size=8, init="xavier"),
        predictor=PredictorConfig(embed_dim=16, depth=2, num_heads=2),
    )
    torch.manual_seed(0)
    model = WorldModel(config)
    teacher, student = frozen_backbone(model.target_encoder), frozen_backbone(model.encoder)
    probe = Probe(LinearHead(32, CLASSES), "teacher")
    encoder = FinetunedEncoder(student.finetune_copy(), LinearHead(32, CLASSES))
    predictor = FinetunedPredictor(
        PredictorBackbone(copy_pretrained(model.predictor)), LinearHead(32, CLASSES), "teacher", 0
    )
    normed = Probe(AttentiveHead(32, 2, CLASSES), "teacher")
    still = Probe(LinearHead(32, CLASSES), "teacher").requires_grad_(False)
    trials = {"probe": probe, "encoder": encoder, "predictor": predictor, "normed": normed, "still": still}
    plan = TrainPlan(
        title="resident",
        folder=folder,
        identity={},
        study=Study(trials, FrozenEncoders({"teacher": teacher}), seeds=[0] * len(trials)),
        tasks=[Resident(dist, accumulation)],
        task_ids=[(0,)] * len(trials),
        optimizers=[
            lars(probe, 50.0, 0.0),
            adamw(encoder, 1e-2, 0.1),
            adamw(predictor, 1e-2, 0.1),
            adamw(normed, 1e-2, 0.1),
            torch.optim.AdamW([{"params": list(still.parameters()), "peak": 0.0}], fused=True),
        ],
        lr_factor=lambda step: 1.0,
        steps=STEPS,
        steps_per_epoch=2.0,
        batch_size=BATCH,
        accumulation=accumulation,
        bf16=False,
        selection="val",
        validate_every=1.0,
        checkpoint_every=100,
        log_every=1,
        tensorboard=False,
    )
    progress = train(plan, dist, StopFlag(), None)
    assert progress is not None
    return {
        "state": {name: value for name, value in plan.study.state_dicts().items() if not name.startswith("3.")},
        "apart": [scores["resident"]["apart"] for scores in progress.scores],
    }


if __name__ == "__main__":
    with init_distributed(TrainConfig(device="cpu")) as dist:
        ended = trajectory(Path(sys.argv[1]), dist, int(sys.argv[2]))
        if dist.is_main:
            torch.save(ended, Path(sys.argv[1]) / "ended.pt")

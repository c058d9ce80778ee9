"""Results of downstream protocols, as in RUN/eval/*.json, with chosen scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iwm.config_io import to_yaml
from iwm.recipes import RECIPES

VIT_B = "ViT 12×768, patch 16, 224 px, predictor 18×384"


def top1(mean: float, error: float = 0.01) -> dict[str, Any]:
    return {"top1": {"mean": mean, "standard_error": error}, "top5": {"mean": 1.0, "standard_error": 0.0}}


def trial(
    mean: float, seed: int = 0, lr: float = 0.001, rate: float | None = 1234.4, **settings: Any
) -> dict[str, Any]:
    speed = {} if rate is None else {"images_per_second": rate}
    best = {"best": {"score": mean + 0.05, "epoch": 3.0}, "skipped_steps": seed, "parameters": 100 + seed}
    return {"lr": lr, "seed": seed, "features": "teacher", **settings, **top1(mean), **best, **speed}


def predictor(kind: str, mean: float, seed: int = 0, **settings: Any) -> dict[str, Any]:
    return trial(mean, seed, predictor=kind, **{"actions": "null", "tokens": "all", **settings})


def result(protocol: str, *trials: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "checkpoint": "/runs/x/checkpoints/step-000300.pt",
        "data": {"shards": "/data/imagenet", "split": "val"},
        "encoder": {"format": "iwm", "description": VIT_B},
        "label": "label",
        "classes": 10,
        "train_images": 5000,
        "val_images": 400,
        "chance": 0.1,
        "epochs": 90.0,
        "steps": 450,
        "batch_size": 1024,
        "trials": {f"arm {number}": each for number, each in enumerate(trials)},
        "chosen": "arm 0",
        "seed": 0,
        "seconds": 1.0,
        **more,
    }


def run(folder: Path, config: str | None = to_yaml(RECIPES["iwm_b16_equi_18x384"]()), **files: dict[str, Any]) -> Path:
    (folder / "eval").mkdir(parents=True)
    for name, each in files.items():
        (folder / "eval" / f"{name}.json").write_text(json.dumps(each))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder

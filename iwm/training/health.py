"""The health of a run, measured on a few held-out images while it trains. A falling loss proves nothing."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from iwm.config import Config
from iwm.evaluation.health import feature_std, rankme
from iwm.evaluation.held_out import first_images
from iwm.evaluation.mrr import BankSettings, measure, summarise
from iwm.models.world_model import WorldModel
from iwm.training.distributed import World

FEATURE_IMAGES = 256
"""Images that feature deviation and RankMe are taken over (fewer where the split has fewer)."""


def held_out(config: Config, here: World) -> UInt8[Tensor, "b h w 3"] | None:
    """The first held-out images as clean views; None where no split is watched, or another process does it.

    The main process does it alone, unless its part of the model is of no use without those of the others.
    """
    if config.data.val is None or not (here.main or config.train.parallel == "fsdp"):
        return None
    most = max(config.log.health_images, FEATURE_IMAGES)
    size, device = config.views.size, here.device
    return first_images(config.data.shards, config.data.val, size=size, most=most, device=device)[0]


def health(model: WorldModel, images: UInt8[Tensor, "b h w 3"]) -> dict[str, float]:
    """MRR on a small bank, and spread and rank of the target encoder's pooled features. The model stays as it was."""
    log = model.config.log
    was_training = model.training
    model.eval()
    bf16 = torch.autocast(images.device.type, torch.bfloat16, enabled=model.config.train.precision == "bf16")
    # Eager: its batch shapes are its own, and each would be compiled beside the training step's.
    with bf16, torch.compiler.set_stance("force_eager"):
        settings = BankSettings(images=log.health_images, size=log.health_bank)
        scores = summarise(measure(model, images[: log.health_images], settings))
        with torch.no_grad():
            features = torch.cat([model.encode(part, "teacher").mean(1).float() for part in images.split(64)])
    model.train(was_training)
    return {
        "mrr_pooled": scores["mrr"]["pooled"]["teacher"]["mean"],
        "mrr_per_token": scores["mrr"]["per_token"]["teacher"]["mean"],
        "mrr_shuffled": scores["shuffled_actions"]["pooled"]["teacher"]["mean"],
        "mrr_chance": scores["chance"],
        "feature_std": feature_std(features).item(),
        "rankme": rankme(features).item(),
    }

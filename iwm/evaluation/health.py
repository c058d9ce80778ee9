"""Health checks of a training run on a few held-out images: MRR, RankMe, standard deviation of features.

They show collapse, which a falling loss does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from iwm.config import Config
from iwm.evaluation.common import first_images
from iwm.evaluation.mrr import compute_ranks, summarise
from iwm.evaluation.settings import BankSettings
from iwm.models.world_model import WorldModel
from iwm.training.distributed import DistEnv
from iwm.training.held_out import held_out_split


@torch.no_grad()
def rankme(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Compute the effective rank: exp of the entropy of the normalised singular values (Garrido et al., 2023, eq. 1).

    From 1 (all features on one line) to min(n, d) (uniform spectrum); compare only values of the same n. NaN if a
    feature is not finite. The result stays on the features' device.
    """
    if not torch.isfinite(features).all():
        return torch.full((), torch.nan, device=features.device)
    singular_values = torch.linalg.svdvals(features.float())
    share = singular_values / singular_values.sum().clamp_min(torch.finfo(torch.float32).tiny) + 1e-7
    return torch.exp(-(share * share.log()).sum())


@torch.no_grad()
def feature_std(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Compute the standard deviation over samples, averaged over dimensions; 0 means collapse."""
    return features.float().std(dim=0).mean()


NUM_FEATURE_IMAGES = 256
"""Number of images for feature_std and RankMe (fewer if the split has fewer)."""


def health_check(config: Config, dist: DistEnv) -> Callable[[WorldModel], dict[str, float]] | None:
    """Return a function that measures a model's health on the images of `health_images`; None without images."""
    images = health_images(config, dist)
    return None if images is None else partial(measure_health, images=images)


def health_images(config: Config, dist: DistEnv) -> UInt8[Tensor, "b h w 3"] | None:
    """Return the first held-out images as clean views; None without a split of them and on other processes.

    Only the main process measures health, except under FSDP, where each process holds a shard of the model.
    """
    split = held_out_split(config.data)
    if split is None or not (dist.is_main or config.train.parallel == "fsdp"):
        return None
    most = max(config.log.eval_images, NUM_FEATURE_IMAGES)
    size, device = config.views.size, dist.device
    return first_images(config.data.folder, split, size=size, most=most, device=device)[0]


def measure_health(model: WorldModel, images: UInt8[Tensor, "b h w 3"]) -> dict[str, float]:
    """Measure MRR on a small bank, and deviation and RankMe of the target encoder's pooled features.

    The model's training mode is restored.
    """
    log = model.config.log
    was_training = model.training
    model.eval()
    bf16 = torch.autocast(images.device.type, torch.bfloat16, enabled=model.config.train.bf16_autocast)
    # Eager, because each batch shape here would trigger another compilation.
    with bf16, torch.compiler.set_stance("force_eager"):
        settings = BankSettings(num_images=log.eval_images, num_views=log.eval_bank_size)
        scores = summarise(compute_ranks(model, images[: log.eval_images], settings))
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

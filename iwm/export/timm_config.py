"""Description of an exported encoder in timm's form: config.json, which `timm.create_model("local-dir:…")` reads.

timm takes the class from `architecture` and every dimension from `model_args`. The preprocessing in `pretrained_cfg`
has the geometry of evaluation (`resized_centre_crop` in dali_pipelines/replay.py), in the terms of timm's transforms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import timm

from dali_pipelines.crops import Interpolation, resized_side
from dali_pipelines.replay import MODES
from iwm.config import Config
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD, timm_arguments

SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
"""timm's names of the published ViTs by width."""
OTHER = "vit_base_patch16_224"
"""Architecture of encoders without a published name; `model_args` overrides all its dimensions."""


def timm_config(
    config: Config, classes: Sequence[str] = (), interpolation: Interpolation = "linear"
) -> dict[str, object]:
    """Return the content of timm's config.json.

    classes: names by number of a linear head's classes; empty: no head. interpolation: that of the images' resize.
    """
    size = config.views.size
    content: dict[str, object] = {
        "architecture": architecture(config.encoder.embed_dim, config.encoder.patch_size),
        "num_classes": len(classes),
        "num_features": config.encoder.embed_dim,
        "global_pool": "avg",
        "model_args": timm_arguments(config.encoder, size) | {"num_classes": len(classes)},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": MODES[interpolation],
            "crop_pct": crop_share(size),
            "crop_mode": "center",
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "num_classes": len(classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return content | ({"label_names": list(classes)} if classes else {})


def architecture(width: int, patch: int) -> str:
    """Return timm's name of the published ViT of this width and patch size (pixels), or OTHER."""
    name = f"vit_{SIZES.get(width)}_patch{patch}_224"
    return name if timm.is_model(name) else OTHER


def crop_share(size: int) -> float:
    """Return timm's crop_pct: the largest float for which timm resizes to ⌊size / crop_pct⌋ = `resized_side(size)`."""
    share = size / resized_side(size)
    return share if math.floor(size / share) == resized_side(size) else math.nextafter(share, 0)

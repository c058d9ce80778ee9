"""Recipes: functions that return a complete configuration. docs/recipes.md says which one is for whom.

The paper's values are the defaults in iwm/config.py; augmentations are those of A.1, which solarizes with probability
0.2. `torchrun iwm/train.py RECIPE` runs a recipe; `--scenario` replaces its photometric augmentations with a row of
table S2, whose `default` is A.1's but for solarize 0.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dali_pipelines.views import SCENARIOS, Views
from iwm.config import Config, DataConfig
from iwm.model_config import ActionConfig, EncoderConfig, LossConfig, MaskingConfig, PredictorConfig
from iwm.train_config import LogConfig, OptimConfig, ScheduleConfig, TrainConfig

VIT_S = EncoderConfig(embed_dim=384, depth=12, num_heads=6)
VIT_B = EncoderConfig(embed_dim=768, depth=12, num_heads=12)
VIT_L = EncoderConfig(embed_dim=1024, depth=24, num_heads=16)
VIT_H14 = EncoderConfig(embed_dim=1280, depth=32, num_heads=16, patch_size=14)
"""ViT-S/16, ViT-B/16, ViT-L/16 and ViT-H/14."""


def demo() -> Config:
    """Demo on tiles of scikit-image's photographs at 32 px: small, yet large enough to learn actions."""
    return Config(
        data=DataConfig(shards="data/demo/shards", global_batch_size=64),
        views=Views(size=32),
        encoder=EncoderConfig(embed_dim=128, depth=4, num_heads=2, patch_size=8, init="xavier"),
        predictor=PredictorConfig(embed_dim=96, depth=6, num_heads=3),
        optim=OptimConfig(lr=5e-4, start_lr=5e-5, grad_clip=3.0, ema_momentum=0.996),
        schedule=ScheduleConfig(steps=2000, epochs=100, warmup_epochs=10),
        train=TrainConfig(compile=False, num_threads=1),
        log=LogConfig(interval=50, checkpoint_interval=1000, eval_interval=1000),
    )


def cpu_small() -> Config:
    """CPU experiments on photographs at 64 px with a small ViT: 20 to 30 minutes on two cores."""
    base = demo()
    return replace(
        base,
        data=replace(base.data, shards="data/photos/shards"),
        views=Views(size=64),
        encoder=EncoderConfig(embed_dim=192, depth=6, num_heads=3, patch_size=8, init="xavier"),
        predictor=PredictorConfig(embed_dim=128, depth=6, num_heads=4),
        optim=replace(base.optim, ema_momentum=0.99),
        schedule=ScheduleConfig(steps=4000, epochs=100, warmup_epochs=10),
        train=TrainConfig(compile=False),
    )


def ijepa_b16_12x384() -> Config:
    """I-JEPA, the baseline of every table: no colour augmentation, no conditioning, separate blocks, smooth L1."""
    return Config(
        views=SCENARIOS["ijepa"],
        predictor=PredictorConfig(embed_dim=384, depth=12),
        action=ActionConfig(conditioning="none"),
        masking=MaskingConfig(type="ijepa"),
        loss=LossConfig(type="smooth_l1"),
    )


def ijepa_l16_12x384() -> Config:
    """I-JEPA with a ViT-L/16 encoder (table S4), its predictor with the encoder's number of heads as in I-JEPA."""
    return replace(
        ijepa_b16_12x384(), encoder=VIT_L, predictor=PredictorConfig(embed_dim=384, depth=12, num_heads=VIT_L.num_heads)
    )


def ijepa_official_h14() -> Config:
    """I-JEPA as its authors train it: configs/in1k_vith14_ep300.yaml of facebookresearch/ijepa."""
    return _ijepa_official(VIT_H14, depth=12)


def ijepa_official_l16() -> Config:
    """I-JEPA as its authors train it, with a ViT-L/16: the settings of their ViT-H/14, as they publish none for it."""
    return _ijepa_official(VIT_L, depth=12)


def ijepa_official_b16() -> Config:
    """I-JEPA as its authors train it, with a ViT-B/16: the settings of their ViT-H/14, as they publish none for it.

    The predictor has 6 blocks, the default of their code for a ViT-B/16.
    """
    return _ijepa_official(VIT_B, depth=6)


def _ijepa_official(encoder: EncoderConfig, depth: int) -> Config:
    paper = ijepa_b16_12x384()
    return replace(
        paper,
        views=replace(paper.views, flip_probability=0.0),
        encoder=encoder,
        predictor=PredictorConfig(embed_dim=384, depth=depth, num_heads=encoder.num_heads),
        masking=MaskingConfig(type="ijepa", sampler="official", cut=True),
        schedule=ScheduleConfig(scale=1.0),
    )


def iwm_s16_inv_12x192() -> Config:
    """IWM-Inv 12×192 with a ViT-S/16 encoder: the proportions of iwm_b16_inv_12x384, not in the paper."""
    return Config(encoder=VIT_S, predictor=PredictorConfig(embed_dim=192, depth=12, num_heads=6))


def iwm_s16_equi_18x192() -> Config:
    """IWM-Equi 18×192 with a ViT-S/16 encoder: the proportions of iwm_b16_equi_18x384, not in the paper."""
    return Config(encoder=VIT_S, predictor=PredictorConfig(embed_dim=192, depth=18, num_heads=6))


def iwm_b16_inv_12x384() -> Config:
    """IWM-Inv 12×384: the paper's invariant model (tables 2, 4 and 8)."""
    return Config(predictor=PredictorConfig(embed_dim=384, depth=12))


def iwm_b16_equi_18x384() -> Config:
    """IWM-Equi 18×384: the paper's equivariant model (tables 2, 4 and 8)."""
    return Config(predictor=PredictorConfig(embed_dim=384, depth=18))


def iwm_l16_inv_18x384() -> Config:
    """IWM-Inv 18×384 with a ViT-L/16 encoder (appendix E). Its 16 heads have an unusual dimension of 24."""
    return Config(encoder=VIT_L, predictor=PredictorConfig(embed_dim=384, depth=18, num_heads=16))


def iwm_l16_equi_36x512() -> Config:
    """IWM-Equi 36×512 with a ViT-L/16 encoder (appendix E)."""
    return Config(encoder=VIT_L, predictor=PredictorConfig(embed_dim=512, depth=36, num_heads=16))


def extended() -> Config:
    """IWM-Equi 18×384 with gamma and colour temperature besides the paper's ops (SCENARIOS), not in the paper."""
    return with_scenario(iwm_b16_equi_18x384(), "extended")


def geometric() -> Config:
    """IWM-Equi 18×384 whose target is also rotated, by up to 20 degrees (SCENARIOS), not in the paper."""
    return with_scenario(iwm_b16_equi_18x384(), "geometric")


def with_scenario(config: Config, scenario: str) -> Config:
    """Return the recipe with the photometric augmentations of SCENARIOS.

    Crop, flip and size stay the recipe's.
    """
    row = SCENARIOS[scenario]
    return replace(config, views=replace(config.views, target=row.target, source=row.source))


RECIPES: dict[str, Callable[[], Config]] = {
    function.__name__: function
    for function in (
        demo,
        cpu_small,
        ijepa_b16_12x384,
        ijepa_l16_12x384,
        ijepa_official_b16,
        ijepa_official_l16,
        ijepa_official_h14,
        iwm_s16_inv_12x192,
        iwm_s16_equi_18x192,
        iwm_b16_inv_12x384,
        iwm_b16_equi_18x384,
        iwm_l16_inv_18x384,
        iwm_l16_equi_36x512,
        extended,
        geometric,
    )
}

"""Recipes: functions that return a whole configuration. The paper's values are the defaults in iwm/config.py.

`torchrun iwm/train.py RECIPE` runs one; `--scenario` puts a row of table S2 in the place of its augmentations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dali_pipelines.augmentation import SCENARIOS, Views
from iwm.config import Action, Config, Data, Encoder, Log, Loss, Masking, Optim, Predictor, Schedule, Train

VIT_TINY = Encoder(width=192, depth=12, heads=3)
VIT_S = Encoder(width=384, depth=12, heads=6)
VIT_B = Encoder(width=768, depth=12, heads=12)
VIT_L = Encoder(width=1024, depth=24, heads=16)
"""The field's encoders at patch 16; `replace(VIT_S, patch=14)` or 8 for the others."""


def demo() -> Config:
    """The embedded data at 32 px on two CPU cores in minutes: small enough to watch, large enough to learn actions."""
    return Config(
        data=Data(shards=Path("data/demo/shards"), batch=64),
        views=Views(size=32),
        encoder=Encoder(width=128, depth=4, heads=2, patch=8, init="xavier"),
        predictor=Predictor(width=96, depth=6, heads=3),
        optim=Optim(lr=5e-4, start_lr=5e-5, clip=3.0, ema=0.996),
        schedule=Schedule(steps=2000, epochs=100, warmup_epochs=10),
        train=Train(compile=False, threads=1),
        log=Log(every=50, checkpoint_every=1000, health_every=1000),
    )


def cpu_small() -> Config:
    """Real experiments on a CPU: photographs at 64 px, a small ViT, 20 to 30 minutes on two cores."""
    base = demo()
    return replace(
        base,
        data=replace(base.data, shards=Path("data/photos/shards")),
        views=Views(size=64),
        encoder=Encoder(width=192, depth=6, heads=3, patch=8, init="xavier"),
        predictor=Predictor(width=128, depth=6, heads=4),
        optim=replace(base.optim, ema=0.99),
        schedule=Schedule(steps=4000, epochs=100, warmup_epochs=10),
        train=Train(compile=False),
    )


def ijepa_b16_12x384() -> Config:
    """I-JEPA, the baseline of every table: no colour, no conditioning, blocks predicted separately, smooth L1."""
    return Config(
        views=SCENARIOS["ijepa"],
        predictor=Predictor(width=384, depth=12),
        action=Action(conditioning="none"),
        masking=Masking(kind="ijepa"),
        loss=Loss(kind="smooth_l1"),
    )


def iwm_b16_inv_12x384() -> Config:
    """IWM-Inv 12×384: the paper's invariant model (tables 2, 4 and 8; 'default' row of table S2)."""
    return Config(predictor=Predictor(width=384, depth=12))


def iwm_b16_equi_18x384() -> Config:
    """IWM-Equi 18×384: the paper's equivariant model (tables 2, 4 and 8)."""
    return Config(predictor=Predictor(width=384, depth=18))


def iwm_l16_inv_18x384() -> Config:
    """IWM-Inv 18×384 with a ViT-L/16 encoder (appendix E). 384 is no multiple of 16 heads' usual sizes: 24 each."""
    return Config(encoder=VIT_L, predictor=Predictor(width=384, depth=18, heads=16))


def iwm_l16_equi_36x512() -> Config:
    """IWM-Equi 36×512 with a ViT-L/16 encoder (appendix E)."""
    return Config(encoder=VIT_L, predictor=Predictor(width=512, depth=36, heads=16))


RECIPES: dict[str, Callable[[], Config]] = {
    function.__name__: function
    for function in (
        demo,
        cpu_small,
        ijepa_b16_12x384,
        iwm_b16_inv_12x384,
        iwm_b16_equi_18x384,
        iwm_l16_inv_18x384,
        iwm_l16_equi_36x512,
    )
}


def with_scenario(config: Config, scenario: str) -> Config:
    """The recipe with the colours of a row of table S2 (SCENARIOS); crop, flip and size stay the recipe's."""
    row = SCENARIOS[scenario]
    return replace(config, views=replace(config.views, target=row.target, source=row.source))

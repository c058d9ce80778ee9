"""Configurations: YAML round trip, unknown keys, contradictory fields, and module names that shadow no library."""

import sys
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import iwm
from dali_pipelines.augmentations import PhotometricConfig
from dali_pipelines.views import SCENARIOS, Views
from iwm.config import Config, ConfigError, DataConfig
from iwm.config_io import config_diff, from_dict, from_yaml, to_dict, to_yaml
from iwm.model_config import EncoderConfig, MaskingConfig, PredictorConfig
from iwm.recipes import RECIPES, with_scenario
from iwm.train_config import TrainConfig


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_configuration_survives_yaml(name: str) -> None:
    config = with_scenario(RECIPES[name](), "strong")
    assert from_yaml(to_yaml(config)) == config


def test_an_unknown_key_is_refused_by_name() -> None:
    raw = to_dict(Config())
    raw["optim"]["momentun"] = 0.9
    with pytest.raises(ConfigError, match="momentun"):
        from_dict(raw)


def test_differences_name_the_field_and_both_values() -> None:
    other = replace(Config(), data=DataConfig(global_batch_size=512))
    assert config_diff(Config(), other) == {"data.global_batch_size": (2048, 512)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(views=Views(size=100)), r"views.size 100 is not a multiple of encoder.patch_size 16"),
        (
            Config(encoder=EncoderConfig(embed_dim=100, num_heads=3)),
            r"encoder.embed_dim 100 is not a multiple of encoder.num_heads 3",
        ),
        (Config(views=Views(size=32)), "too small to mask"),
        (Config(masking=MaskingConfig(type="ijepa", num_blocks=6)), "cover the whole context block"),
        (Config(views=Views(source=PhotometricConfig(hue=-0.1))), r"views.source: hue -0.1 must not be negative"),
        (
            Config(views=Views(target=PhotometricConfig(blur_probability=2.0))),
            r"views.target: blur_probability 2.0 must be from 0 to 1",
        ),
        (
            Config(views=Views(crop_scale=(0.5, 0.3))),
            r"views.crop_scale 0.5 0.3 must be MIN MAX with 0 < MIN <= MAX <= 1",
        ),
        (
            Config(train=TrainConfig(precision="fp8"), predictor=PredictorConfig(embed_dim=376, num_heads=8)),
            r"train.precision fp8: predictor.embed_dim 376 and predictor.mlp_ratio 4.0 make layers of 376 and 1504",
        ),
        (
            Config(train=TrainConfig(precision="fp8", parallel="fsdp")),
            r"train.precision fp8: float8 layers of sharded parameters were never tested; use --train.parallel ddp",
        ),
        (
            Config(train=TrainConfig(compile=False, compile_mode="max-autotune-no-cudagraphs")),
            r"train.compile_mode max-autotune-no-cudagraphs: nothing is compiled; use --train.compile or",
        ),
        (
            Config(train=TrainConfig(deterministic=True, compile_mode="max-autotune-no-cudagraphs")),
            r"train.compile_mode max-autotune-no-cudagraphs: kernels are chosen by their times",
        ),
        (Config(data=DataConfig(global_batch_size=0)), r"data.global_batch_size 0: must be at least 1"),
    ],
)
def test_contradictions_are_named(config: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check()


def test_a_scenario_changes_colours_alone() -> None:
    recipe = RECIPES["demo"]()
    changed = with_scenario(recipe, "strong_jitter")
    assert changed.views.source == SCENARIOS["strong_jitter"].source
    assert replace(changed, views=recipe.views) == recipe
    assert changed.views.size == recipe.views.size


def test_no_module_of_iwm_shadows_a_library() -> None:
    """`torchrun iwm/train.py` puts iwm/ first on the path, so that each of its modules is a top-level name."""
    dist = {path.stem for path in Path(iwm.__path__[0]).iterdir() if path.suffix == ".py" or path.is_dir()}
    dist -= {"__init__", "__pycache__"}
    assert dist & set(sys.stdlib_module_names) == set()
    assert dist & set(packages_distributions()) == set()

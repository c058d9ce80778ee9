"""Configurations: stored and read back whole, unknown keys refused, contradictions named; names clash with nothing."""

import sys
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import iwm
from dali_pipelines.augmentation import SCENARIOS, Views
from iwm.config import Config, ConfigError, Data, Encoder, Masking, differences, from_dict, from_yaml, to_dict, to_yaml
from iwm.recipes import RECIPES, with_scenario


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
    other = replace(Config(), data=Data(batch=512))
    assert differences(Config(), other) == {"data.batch": (2048, 512)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(views=Views(size=100)), r"views.size 100 is not a multiple of encoder.patch 16"),
        (Config(encoder=Encoder(width=100, heads=3)), r"encoder.width 100 is not a multiple of encoder.heads 3"),
        (Config(views=Views(size=32)), "too small to mask"),
        (Config(masking=Masking(kind="ijepa", blocks=6)), "cover the whole context block"),
        (Config(data=Data(batch=0)), r"data.batch 0 must be positive"),
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
    """`torchrun iwm/train.py` puts iwm/ first on the path, where each of its modules is a top-level name."""
    here = {path.stem for path in Path(iwm.__path__[0]).iterdir() if path.suffix == ".py" or path.is_dir()}
    here -= {"__init__", "__pycache__"}
    assert here & set(sys.stdlib_module_names) == set()
    assert here & set(packages_distributions()) == set()

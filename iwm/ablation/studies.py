"""Studies: which runs a table of the paper takes, and where each one stands in it. iwm/ablate.py trains
and judges them.

A small recipe is asked the paper's question in its own size: where the paper compares predictors of 12 and 18 blocks
behind an encoder of 12, a study compares as many blocks as the recipe's encoder has and half as many again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from cattrs import ClassValidationError, transform_error
from cattrs.preconf.pyyaml import make_converter

from dali_pipelines.augmentation import SCENARIOS, Photometric
from iwm.config import Config, ConfigError
from iwm.evaluation.mrr import JITTERED
from iwm.evaluation.paper import TABLE_1, TABLE_2, TABLE_S2


@dataclass(frozen=True)
class Arm:
    """A model to train, and its place in the study's table."""

    row: str
    column: str
    options: tuple[str, ...]
    """Options of iwm/train.py behind the recipe's name. Arms with the same options are one run."""
    bank: str = "default"
    """Scenario whose jitter fills the arm's own bank (iwm/evaluation/mrr.py)."""
    paper: float | None = None
    """MRR that the paper prints in this place."""


@dataclass(frozen=True)
class Study:
    title: str
    arms: tuple[Arm, ...]

    @property
    def rows(self) -> list[str]:
        """Names of the rows, in order."""
        return list(dict.fromkeys(arm.row for arm in self.arms))

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(dict.fromkeys(arm.column for arm in self.arms))


ROWS = {"jitter": "jitter", "default": "+ destructive", "strong": "+ strong jitter", "destructive": "no jitter"}
"""Scenarios by the names of table 2's rows; `destructive` is the one of table S2 without jitter."""


def conditioning(recipe: Config) -> Study:
    """Table 1, also with strong jitter and with none: no, sequence and feature conditioning."""
    return Study(
        "Table 1: conditioning of the predictor",
        tuple(
            Arm(
                ROWS[scenario],
                kind,
                (*_scenario(scenario), "--action.conditioning", kind),
                _own_bank(scenario),
                TABLE_1[kind] if scenario == "default" else None,
            )
            for scenario in ("default", "strong", "destructive")
            for kind in ("none", "sequence", "feature")
        ),
    )


def complexity(recipe: Config) -> Study:
    """Table 2: I-JEPA and two depths of the predictor, by complexity of the transformations."""
    shallow, deep = depths(recipe)
    ijepa = ("--action.conditioning", "none", "--masking.kind", "ijepa", "--loss.kind", "smooth_l1")
    columns: tuple[tuple[str, str, Callable[[str], tuple[str, ...]]], ...] = (
        (f"I-JEPA, {shallow} blocks", "ijepa_12x384", lambda _: (*_scenario("ijepa"), *ijepa, *_depth(shallow))),
        (f"IWM, {shallow} blocks", "iwm_12x384", lambda scenario: (*_scenario(scenario), *_depth(shallow))),
        (f"IWM, {deep} blocks", "iwm_18x384", lambda scenario: (*_scenario(scenario), *_depth(deep))),
    )
    return Study(
        "Table 2: transformations and the predictor's depth",
        tuple(
            Arm(ROWS[scenario], column, options(scenario), scenario, TABLE_2[scenario, predictor])
            for scenario in ("jitter", "default", "strong")
            for column, predictor, options in columns
        ),
    )


def augmentation(recipe: Config) -> Study:
    """Table S2: six scenarios, two depths of the predictor."""
    return Study(
        "Table S2: augmentations",
        tuple(
            Arm(
                f"IWM, {depth} blocks: {_words(SCENARIOS[scenario].source)}",
                "MRR",
                (*_scenario(scenario), *_depth(depth)),
                _own_bank(scenario),
                TABLE_S2[paper_depth, scenario]["mrr"],
            )
            for depth, paper_depth in zip(depths(recipe), (12, 18), strict=True)
            for scenario in ("default", "jitter", "more_destructive", "strong", "strong_jitter", "destructive")
        ),
    )


STUDIES: dict[str, Callable[[Config], Study]] = {
    "conditioning": conditioning,
    "complexity": complexity,
    "augmentation": augmentation,
}


def depths(recipe: Config) -> tuple[int, int]:
    """Blocks of the shallow and the deep predictor: the encoder's, and half as many again (12 and 18 for ViT-B)."""
    return recipe.encoder.depth, recipe.encoder.depth * 3 // 2


def read_study(path: Path) -> Study:
    """A study of one's own, a YAML file: `title` and `arms`, each with the fields of `Arm`.

    Raises ConfigError that names the file and the field where it is not one.
    """
    try:
        raw = yaml.safe_load(path.read_text())
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} must have the fields title and arms")
        study = make_converter(forbid_extra_keys=True).structure(raw, Study)
    except OSError as error:
        raise ConfigError(
            f"'{path}' is no study: say one of {', '.join(STUDIES)}, or a YAML file ({error.strerror})"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except ClassValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(transform_error(error))}") from error
    places = [(arm.row, arm.column) for arm in study.arms]
    twice = next((place for place in places if places.count(place) > 1), None)
    if not study.arms or twice:
        problem = f"two arms share row '{twice[0]}' and column '{twice[1]}'" if twice else "there are no arms"
        raise ConfigError(f"{path}: {problem}")
    unknown = next((arm.bank for arm in study.arms if arm.bank not in JITTERED), None)
    if unknown:
        raise ConfigError(f"{path}: bank '{unknown}' is no scenario with jitter; choose one of {JITTERED}")
    return study


def _scenario(name: str) -> tuple[str, ...]:
    return ("--scenario", name)


def _depth(blocks: int) -> tuple[str, ...]:
    return ("--predictor.depth", str(blocks))


def _own_bank(scenario: str) -> str:
    return scenario if scenario in JITTERED else "default"


def _words(source: Photometric) -> str:
    parts = []
    if source.jitter_probability:
        parts.append(f"jitter {' '.join(f'{s:g}' for s in source.strengths)} at {source.jitter_probability:g}")
    for name in ("blur", "grayscale", "solarize"):
        probability: float = getattr(source, f"{name}_probability")
        if probability:
            parts.append(f"{name} {probability:g}")
    return ", ".join(parts)

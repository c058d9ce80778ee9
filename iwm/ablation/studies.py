"""Ablation studies: variants of the paper's tables 1, 2 and S2, and of choices that the paper leaves open.

Studies scale with the recipe. The paper compares predictors of 12 and 18 blocks with an encoder of 12; a study compares
the number of blocks of the recipe's encoder and 1.5 times that number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import tyro

from dali_pipelines.augmentations import DESTRUCTIVE_OPS, JITTER_OPS, JitterImpl, PhotometricConfig
from dali_pipelines.views import SCENARIOS
from iwm.config import Config
from iwm.evaluation.paper_results import TABLE_1, TABLE_2, TABLE_S2
from iwm.evaluation.settings import JITTER_SCENARIOS, BankSize
from iwm.model_config import ActionConfig, Initialisation
from iwm.ranges import Range
from iwm.recipes import RECIPES
from iwm.train_options import RUNS


@dataclass(frozen=True)
class Variant:
    """Model to train, with its place in the study's table."""

    row: str
    column: str
    options: tuple[str, ...]
    """Options of iwm/train.py after the recipe name. Variants with the same options share a run."""
    bank: str = "default"
    """Scenario whose jitter the variant's own bank is sampled from (iwm/evaluation/bank.py)."""
    paper: float | None = None
    """MRR in the paper's table."""
    bank_jitter_impl: JitterImpl | None = None
    """Computation of the jitter of the variant's own bank; None: the run's own."""
    table_s2: tuple[int, str] | None = None
    """Key in TABLE_S2 of the paper's accuracies."""

    @property
    def bank_name(self) -> str:
        """Name of the variant's own bank in files and tables."""
        return self.bank if self.bank_jitter_impl is None else f"{self.bank}-{self.bank_jitter_impl}"


@dataclass(frozen=True)
class AblationStudy:
    """Title and variants of a study."""

    title: str
    variants: tuple[Variant, ...]

    @property
    def rows(self) -> list[str]:
        """Names of the rows, in order."""
        return list(dict.fromkeys(variant.row for variant in self.variants))

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(dict.fromkeys(variant.column for variant in self.variants))


ROWS = {"jitter": "jitter", "default": "+ destructive", "strong": "+ strong jitter", "destructive": "no jitter"}
"""Row names of table 2 by scenario; `destructive` is the scenario of table S2 without jitter."""


def conditioning(recipe: Config) -> AblationStudy:
    """Return the study of table 1: every kind of conditioning, also with strong jitter and without jitter."""
    return AblationStudy(
        "Table 1: conditioning of the predictor",
        tuple(
            Variant(
                ROWS[scenario],
                kind,
                (*_scenario(scenario), "--action.conditioning", kind),
                _own_bank(scenario),
                TABLE_1.get(kind) if scenario == "default" else None,
            )
            for scenario in ("default", "strong", "destructive")
            for kind in get_args(get_type_hints(ActionConfig)["conditioning"])
        ),
    )


def complexity(recipe: Config) -> AblationStudy:
    """Return the study of table 2: I-JEPA and two predictor depths, by complexity of the transformations."""
    shallow, deep = depths(recipe)
    ijepa = ("--action.conditioning", "none", "--masking.type", "ijepa", "--loss.type", "smooth_l1")
    columns: tuple[tuple[str, str, Callable[[str], tuple[str, ...]]], ...] = (
        (f"I-JEPA, {shallow} blocks", "ijepa_12x384", lambda _: (*_scenario("ijepa"), *ijepa, *_depth(shallow))),
        (f"IWM, {shallow} blocks", "iwm_12x384", lambda scenario: (*_scenario(scenario), *_depth(shallow))),
        (f"IWM, {deep} blocks", "iwm_18x384", lambda scenario: (*_scenario(scenario), *_depth(deep))),
    )
    return AblationStudy(
        "Table 2: complexity of the transformations and predictor depth",
        tuple(
            Variant(
                ROWS[scenario],
                column,
                options(scenario),
                scenario,
                TABLE_2[scenario, predictor],
                table_s2=_in_table_s2(predictor, scenario),
            )
            for scenario in ("jitter", "default", "strong")
            for column, predictor, options in columns
        ),
    )


def augmentation(recipe: Config) -> AblationStudy:
    """Return the study of table S2: six scenarios, two predictor depths."""
    return AblationStudy(
        "Table S2: augmentations",
        tuple(
            Variant(
                f"IWM, {depth} blocks: {_words(SCENARIOS[scenario].source)}",
                "MRR",
                (*_scenario(scenario), *_depth(depth)),
                _own_bank(scenario),
                TABLE_S2[paper_depth, scenario]["mrr"],
                table_s2=(paper_depth, scenario),
            )
            for depth, paper_depth in zip(depths(recipe), (12, 18), strict=True)
            for scenario in ("default", "jitter", "more_destructive", "strong", "strong_jitter", "destructive")
        ),
    )


def initialisation(recipe: Config) -> AblationStudy:
    """Return the study of encoder.init: every initialisation."""
    return AblationStudy(
        "Initialisation",
        tuple(Variant("default", kind, ("--encoder.init", kind)) for kind in get_args(Initialisation)),
    )


def jitter_encoding(recipe: Config) -> AblationStudy:
    """Return the study of action.jitter_encoding, whose sources are jittered: a difference of factors or a ratio."""
    return AblationStudy(
        "Encoding of jitter in the action",
        tuple(
            Variant("default", kind, ("--action.jitter-encoding", kind))
            for kind in get_args(get_type_hints(ActionConfig)["jitter_encoding"])
        ),
    )


def jitter_impl(recipe: Config) -> AblationStudy:
    """Return the study of views.jitter_impl: trained with each computation of the jitter, evaluated with each."""
    kinds = get_args(JitterImpl)
    return AblationStudy(
        "Computation of jitter",
        tuple(
            Variant(
                f"trained with {trained}", f"bank of {bank}", ("--views.jitter-impl", trained), bank_jitter_impl=bank
            )
            for trained in kinds
            for bank in kinds
        ),
    )


STUDIES: dict[str, Callable[[Config], AblationStudy]] = {
    "conditioning": conditioning,
    "complexity": complexity,
    "augmentation": augmentation,
    "initialisation": initialisation,
    "jitter-encoding": jitter_encoding,
    "jitter-impl": jitter_impl,
}


@dataclass(frozen=True)
class AblateOptions:
    """Options of iwm/ablate.py."""

    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join(STUDIES))]
    """`conditioning` (table 1), `complexity` (table 2), `augmentation` (table S2). Not in the paper:
    `initialisation`, `jitter-encoding`, `jitter-impl`."""
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join(RECIPES))]
    """Recipe that every variant is based on."""
    out: Path | None = None
    """Folder of the runs, the tables and the report page. Default: runs/ablate-STUDY-RECIPE."""
    seeds: Annotated[tuple[int, ...], Range(min=0)] = (0,)
    """Seeds; each variant is trained once with each seed."""
    common: str = "default"
    """Scenario whose jitter the common bank of all variants is sampled from."""
    jobs: Annotated[int, Range(min=1)] = 1
    """Number of runs that train in parallel."""
    processes: Annotated[int, Range(min=1)] = 1
    """Processes of each run (torchrun's --nproc_per_node)."""
    only: Annotated[int | None, Range(min=1)] = None
    """Number of the one run to train and evaluate, in the order of --list-runs; it writes no tables.
    A job array trains a run in each job (slurm/study.sbatch). None: all runs, then the tables."""
    list_runs: bool = False
    """List the runs with their numbers, and train nothing."""
    bank: BankSize = field(default_factory=BankSize)
    """Banks that runs are evaluated on: each on that of its own jitter and on that of --common."""

    @property
    def folder(self) -> Path:
        return self.out or RUNS / f"ablate-{self.study}-{self.recipe}"


def depths(recipe: Config) -> tuple[int, int]:
    """Return the blocks of the shallow and the deep predictor: 1 and 1.5 times the encoder's (12 and 18 for ViT-B)."""
    return recipe.encoder.depth, recipe.encoder.depth * 3 // 2


def _scenario(name: str) -> tuple[str, ...]:
    return ("--scenario", name)


def _depth(blocks: int) -> tuple[str, ...]:
    return ("--predictor.depth", str(blocks))


def _in_table_s2(predictor: str, scenario: str) -> tuple[int, str] | None:
    """Return the key in TABLE_S2 of a predictor of table 2; None for I-JEPA, which is not in it."""
    found = {"iwm_12x384": (12, scenario), "iwm_18x384": (18, scenario)}
    return found.get(predictor)


def _own_bank(scenario: str) -> str:
    return scenario if scenario in JITTER_SCENARIOS else "default"


def _words(source: PhotometricConfig) -> str:
    parts = []
    if source.jitter_probability:
        strengths = (f"{getattr(source, op.name):g}" for op in JITTER_OPS if op.in_paper)
        parts.append(f"jitter {' '.join(strengths)} at {source.jitter_probability:g}")
    for op in sorted(DESTRUCTIVE_OPS, key=lambda op: op.name):
        if probability := source.probability(op):
            parts.append(f"{op.name} {probability:g}")
    return ", ".join(parts)

"""A study is the paper's table: its places, the paper's figures, and options that iwm/train.py takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dali_pipelines.views import SCENARIOS
from iwm.ablation.runs import plan
from iwm.ablation.studies import STUDIES, AblationStudy, Variant
from iwm.evaluation.settings import BankSize
from iwm.recipes import RECIPES
from iwm.train_options import parse


def _figures(name: str, recipe: str) -> dict[tuple[str, str], float | None]:
    return {(trial.row, trial.column): trial.paper for trial in STUDIES[name](RECIPES[recipe]()).variants}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("recipe", ["demo", "iwm_b16_equi_18x384"])
def test_every_arm_is_a_configuration_that_can_be_run(name: str, recipe: str) -> None:
    for trial in STUDIES[name](RECIPES[recipe]()).variants:
        parse([recipe, *trial.options]).config.check()


def test_conditioning_has_the_figures_of_table_1_and_varies_nothing_else() -> None:
    figures = _figures("conditioning", "demo")
    assert [figures["+ destructive", kind] for kind in ("none", "sequence", "feature")] == [0.00, 0.82, 0.79]
    assert len(figures) == 9
    for trial in STUDIES["conditioning"](RECIPES["demo"]()).variants:
        config = parse(["demo", *trial.options]).config
        assert config.action.conditioning == trial.column
        scenario = {"+ destructive": "default", "+ strong jitter": "strong", "no jitter": "destructive"}[trial.row]
        assert config.views.source == SCENARIOS[scenario].source
        assert config.predictor == RECIPES["demo"]().predictor


def test_complexity_has_the_figures_and_the_predictors_of_table_2() -> None:
    figures = _figures("complexity", "iwm_b16_equi_18x384")
    assert figures["+ destructive", "IWM, 18 blocks"] == 0.79
    assert figures["jitter", "IWM, 12 blocks"] == 0.11
    assert figures["+ strong jitter", "I-JEPA, 12 blocks"] == 0.00
    trials = {(trial.row, trial.column): trial for trial in STUDIES["complexity"](RECIPES["demo"]()).variants}
    assert {parse(["demo", *trial.options]).config.predictor.depth for trial in trials.values()} == {4, 6}
    assert trials["+ strong jitter", "IWM, 6 blocks"].bank == "strong"
    ijepa = [trial for trial in trials.values() if trial.column.startswith("I-JEPA")]
    assert len({trial.options for trial in ijepa}) == 1, "the three banks judge one I-JEPA"


def test_augmentation_has_the_figures_of_table_s2_in_both_depths() -> None:
    figures = [trial.paper for trial in STUDIES["augmentation"](RECIPES["demo"]()).variants]
    assert figures == [0.09, 0.11, 0.22, 0.81, 0.07, 0.02, 0.79, 0.25, 0.85, 0.85, 0.83, 0.02]


def test_arms_of_the_same_options_share_a_run_and_others_never_share_a_folder(tmp_path: Path) -> None:
    study = AblationStudy(
        "x", (Variant("a b", "c", ("1",)), Variant("a", "b-c", ("2",), "strong"), Variant("d", "e", ("1",), "strong"))
    )
    runs = plan(
        study,
        [0],
        out=tmp_path,
        training=lambda trial: trial.options,
        common="default",
        bank=BankSize(num_images=4),
    )
    first, second, third = (runs[trial, 0] for trial in study.variants)
    assert first == third
    assert (first.name, second.name) == ("a-b-c-seed0", "a-b-c-2-seed0")
    assert [judge.output for judge in first.evaluations] == ["mrr-default", "mrr-strong", "similarity"]

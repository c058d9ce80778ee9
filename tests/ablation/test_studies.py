"""A study is the paper's table: its places, the paper's figures, and options that iwm/train.py takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dali_pipelines.augmentation import SCENARIOS
from iwm.ablation.runs import plan
from iwm.ablation.studies import STUDIES, Arm, Study, read_study
from iwm.config import ConfigError
from iwm.evaluation.mrr import BankSettings
from iwm.recipes import RECIPES
from iwm.train import parse


def _figures(name: str, recipe: str) -> dict[tuple[str, str], float | None]:
    return {(arm.row, arm.column): arm.paper for arm in STUDIES[name](RECIPES[recipe]()).arms}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("recipe", ["demo", "iwm_b16_equi_18x384"])
def test_every_arm_is_a_configuration_that_can_be_run(name: str, recipe: str) -> None:
    for arm in STUDIES[name](RECIPES[recipe]()).arms:
        parse([recipe, *arm.options]).config.check()


def test_conditioning_has_the_figures_of_table_1_and_varies_nothing_else() -> None:
    figures = _figures("conditioning", "demo")
    assert [figures["+ destructive", kind] for kind in ("none", "sequence", "feature")] == [0.00, 0.82, 0.79]
    assert len(figures) == 9
    for arm in STUDIES["conditioning"](RECIPES["demo"]()).arms:
        config = parse(["demo", *arm.options]).config
        assert config.action.conditioning == arm.column
        scenario = {"+ destructive": "default", "+ strong jitter": "strong", "no jitter": "destructive"}[arm.row]
        assert config.views.source == SCENARIOS[scenario].source
        assert config.predictor == RECIPES["demo"]().predictor


def test_complexity_has_the_figures_and_the_predictors_of_table_2() -> None:
    figures = _figures("complexity", "iwm_b16_equi_18x384")
    assert figures["+ destructive", "IWM, 18 blocks"] == 0.79
    assert figures["jitter", "IWM, 12 blocks"] == 0.11
    assert figures["+ strong jitter", "I-JEPA, 12 blocks"] == 0.00
    arms = {(arm.row, arm.column): arm for arm in STUDIES["complexity"](RECIPES["demo"]()).arms}
    assert {parse(["demo", *arm.options]).config.predictor.depth for arm in arms.values()} == {4, 6}
    assert arms["+ strong jitter", "IWM, 6 blocks"].bank == "strong"
    ijepa = [arm for arm in arms.values() if arm.column.startswith("I-JEPA")]
    assert len({arm.options for arm in ijepa}) == 1, "the three banks judge one I-JEPA"


def test_augmentation_has_the_figures_of_table_s2_in_both_depths() -> None:
    figures = [arm.paper for arm in STUDIES["augmentation"](RECIPES["demo"]()).arms]
    assert figures == [0.09, 0.11, 0.22, 0.81, 0.07, 0.02, 0.79, 0.25, 0.85, 0.85, 0.83, 0.02]


def test_a_study_of_ones_own_is_read_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "title: Widths\narms:\n"
        "  - {row: a, column: narrow, options: [--predictor.width, '48']}\n"
        "  - {row: a, column: wide, options: [], bank: strong, paper: 0.5}\n"
    )
    study = read_study(file)
    assert (study.title, study.rows, study.columns) == ("Widths", ["a"], ["narrow", "wide"])
    assert study.arms[0].options == ("--predictor.width", "48")
    assert (study.arms[0].bank, study.arms[1].bank, study.arms[1].paper) == ("default", "strong", 0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("title: x\narms: [{row: a, column: b, options: [], colour: red}]", "colour"),
        ("title: x\narms: []", "no arms"),
        ("arms: [{row: a, column: b, options: []}]", "title"),
        ("title: x\narms: [{row: a, column: b, options: []}, {row: a, column: b, options: []}]", "row 'a'"),
        ("title: x\narms: [{row: a, column: b, options: [], bank: ijepa}]", "bank 'ijepa'.*strong_jitter"),
        ("title: [", "no YAML"),
        ("just words", "Widths.yaml"),
    ],
)
def test_a_file_that_is_no_study_is_named_with_its_field(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "Widths.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        read_study(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_arms_of_the_same_options_share_a_run_and_others_never_share_a_folder(tmp_path: Path) -> None:
    study = Study("x", (Arm("a b", "c", ("1",)), Arm("a", "b-c", ("2",), "strong"), Arm("d", "e", ("1",), "strong")))
    runs = plan(
        study, [0], out=tmp_path, training=lambda arm: arm.options, common="default", bank=BankSettings(images=4)
    )
    first, second, third = (runs[arm, 0] for arm in study.arms)
    assert first == third
    assert (first.name, second.name) == ("a-b-c-seed0", "a-b-c-2-seed0")
    assert [judge.output for judge in first.judges] == ["mrr-default", "mrr-strong", "similarity"]


def test_an_unknown_name_lists_the_studies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'depth' is no study.*complexity"):
        read_study(Path("depth"))

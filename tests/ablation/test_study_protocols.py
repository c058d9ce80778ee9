"""Downstream protocols of a study: their options, their tables beside the paper's, and what runs again."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

from iwm.ablate import main
from iwm.ablation.evaluations import protocol_evaluations, split_sections
from iwm.ablation.runs import IDENTITY, PlannedRun, _discard_other_training, is_done, result_file
from iwm.ablation.studies import STUDIES, AblateOptions
from iwm.ablation.tables import tables
from iwm.evaluation.result_table import ResultTable
from iwm.recipes import RECIPES
from iwm.train_options import parse
from shards.errors import UserError
from tests.ablation.test_tables import _result
from tests.ablation.widths import widths
from tests.downstream.written_results import predictor, result, trial
from tests.evaluation.printed import assert_whole
from tests.training.runs import TINY


def test_sections_are_those_of_the_study_of_training_and_of_protocols() -> None:
    words = ["augmentation", "demo", "--seeds", "0", "1", "--", "--data.shards", "x"]
    words += ["--", "linear", "--steps", "3", "--", "attentive"]
    own, training, protocols = split_sections(words)
    assert own == words[:5]
    assert training == ["--data.shards", "x"]
    assert protocols == [["linear", "--steps", "3"], ["attentive"]]
    assert split_sections(["a", "--", "linear"]) == (["a"], [], [["linear"]])
    assert split_sections(["a", "--", "--", "linear"]) == (["a"], [], [["linear"]])
    assert split_sections(["a"]) == (["a"], [], [])


def test_the_pretrained_predictor_alone_is_finetuned_unless_others_are_named() -> None:
    [alone] = protocol_evaluations([["finetune-predictor", "--steps", "3"]])
    assert alone.settings["predictors"] == ["pretrained"]
    assert alone.settings["steps"] == 3
    assert not {"checkpoint", "output"} & alone.settings.keys()
    [both] = protocol_evaluations([["finetune-predictor", "--predictors", "pretrained", "random"]])
    assert both.settings["predictors"] == ["pretrained", "random"]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ([["lineal"]], r"no protocol 'lineal'; did you mean 'linear'"),
        ([[]], r"not followed by a protocol; name one of linear"),
        ([["linear"], ["linear"]], r"-- linear: the protocol is given twice"),
        ([["multitask", "--tasks", "a"]], r"-- multitask: the protocol has no single score"),
        ([["linear", "--output", "x.json"]], r"-- linear --output: the study sets it"),
        ([["linear", "--checkpoint=x"]], r"-- linear --checkpoint: the study sets it"),
        ([["linear", "--epochs", "0"]], r"epochs"),
        ([["finetune-predictor", "--predictors", "random"]], r"--predictors: .*add pretrained"),
    ],
)
def test_a_mistake_in_a_protocol_is_one_line(sections: list[list[str]], says: str) -> None:
    with pytest.raises(UserError, match=says) as stop:
        protocol_evaluations(sections)
    assert "\n" not in str(stop.value)


def test_a_missing_label_column_is_named_before_anything_is_trained(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STUDIES, "widths", widths)
    command = ["widths", "demo", "--out", str(tmp_path / "out"), "--", "--data.shards", str(tiny_shards)]
    command += ["--predictor.num-heads", "2"]
    with pytest.raises(UserError, match=r"no label column 'colour'.*-- linear --data.label"):
        main([*command, "--", "linear", "--data.label", "colour"])
    with pytest.raises(UserError, match=r"-- attentive --data.train"):
        main([*command, "--", "attentive", "--data.train", "more"])
    assert not (tmp_path / "out").exists()


def test_the_documented_commands_are_understood() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ablations.md").read_text()
    commands = re.findall(r"^python iwm/ablate.py (?!STUDY)((?:[^\n\\]|\\\n)+)", page, re.M)
    assert len(commands) == 3
    for command in commands:
        own, training, sections = split_sections(shlex.split(command.replace("\\\n", " ")))
        options = tyro.cli(AblateOptions, args=own)
        assert options.study in STUDIES
        parse([options.recipe, *training]).config.check()
        assert len(protocol_evaluations(sections)) == (3 if options.study == "augmentation" else 0)


# Tables


def _records(accuracies: dict[str, tuple[float, ...]], seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    """Records of the first variants of the study of table S2; accuracies by protocol, one per variant."""
    records = []
    for i, variant in enumerate(STUDIES["augmentation"](RECIPES["iwm_b16_equi_18x384"]()).variants[:3]):
        for seed in seeds:
            mrr = 0.1 + i / 10 + seed / 100
            record = _result(variant.row, variant.column, variant.bank_name, seed, mrr, mrr)
            for name, values in accuracies.items():
                mean = values[i] + seed / 100
                trials = (predictor("pretrained", mean), predictor("random", 0.99))
                made = trials if name == "finetune-predictor" else (trial(mean), trial(0.1, lr=3.0))
                record["evaluations"][f"study-{name}"] = result(name, *made)
            records.append(record)
    return records


def _tables(records: list[dict[str, Any]], *protocols: str) -> list[ResultTable]:
    return tables(STUDIES["augmentation"](RECIPES["iwm_b16_equi_18x384"]()), records, "default", protocols)


def test_table_s2_has_mrr_and_accuracies_with_range_and_the_papers_beside_them() -> None:
    accuracies = {"linear": (0.7, 0.6, 0.5), "attentive": (0.7, 0.7, 0.7), "finetune-predictor": (0.8, 0.81, 0.83)}
    whole, figure, *others = _tables(_records(accuracies), *accuracies)
    assert whole.title == "Table S2: augmentations"
    assert len(whole.rows) == 12
    assert whole.rows[0][1:] == [
        "0.105 (0.100–0.110), paper 0.09",
        "70.5 (70.0–71.0), paper 74.5",
        "70.5 (70.0–71.0), paper 77.0",
        "80.5 (80.0–81.0), paper 81.3",
    ]
    assert whole.rows[11][1:] == ["not run, paper 0.02", *(f"not run, paper {n}" for n in ("70.9", "74.8", "81.5"))]
    assert "Mean over seeds 0, 1" in whole.caption
    assert "Paper: ViT-B/16" in whole.caption
    assert "linear on imagenet" in whole.caption
    assert figure.rows == [["ours, 3 models", "-1.00", "–", "+0.98"], ["paper, 12 models", "-0.61", "-0.52", "+0.86"]]
    assert len(others) == 5
    for table in (whole, figure):
        assert_whole(table)


def test_a_protocol_that_was_not_run_is_a_cell_not_run() -> None:
    whole, figure, *_ = _tables(_records({"linear": (0.7, 0.6, 0.5)}, seeds=(0,)), "linear", "attentive")
    assert whole.rows[0][1:] == ["0.100, paper 0.09", "70.0, paper 74.5", "not run, paper 77.0"]
    assert figure.rows[0] == ["ours, 3 models", "-1.00", "–"]


def test_other_studies_have_a_grid_for_each_protocol_and_without_protocols_none() -> None:
    study = STUDIES["complexity"](RECIPES["iwm_b16_equi_18x384"]())
    place = study.variants[1]
    record = _result(place.row, place.column, place.bank_name, 0, 0.2, 0.1)
    record["evaluations"] |= {
        "mrr-jitter": record["evaluations"]["mrr-default"],
        "study-linear": result("linear", trial(0.5)),
    }
    grid, *_ = tables(study, [record], "default", ["linear"])
    assert grid.title == "Linear probing"
    assert grid.rows[0] == ["jitter", "not run", "50.0, paper 72.1", "not run, paper 70.1"]
    assert len(tables(study, [record], "default")) == 5


# Resuming


def _planned(run: Path, *options: str) -> PlannedRun:
    return PlannedRun(run, (), protocol_evaluations([["linear", *options]]))


def test_a_training_with_other_settings_or_of_another_checkpoint_is_discarded_and_the_same_one_resumes(
    tmp_path: Path,
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000007.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"x")
    run = _planned(tmp_path / "run", "--steps", "3")
    last = tmp_path / "run" / "eval" / "study-linear" / "last.pt"
    _discard_other_training(run, run.evaluations[0])
    assert (last.parent / IDENTITY).exists()
    last.write_bytes(b"state")
    _discard_other_training(run, run.evaluations[0])
    assert last.exists()
    other = _planned(tmp_path / "run", "--steps", "4")
    _discard_other_training(other, other.evaluations[0])
    assert not last.exists()
    last.write_bytes(b"state")
    checkpoint.rename(checkpoint.with_name("step-000000009.pt"))
    _discard_other_training(other, other.evaluations[0])
    assert not last.exists()


def test_a_result_counts_only_with_the_settings_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000000007.pt").write_bytes(b"x")
    run, other = _planned(tmp_path, "--steps", "3"), _planned(tmp_path, "--steps", "4")
    file = result_file(run, run.evaluations[0])
    file.parent.mkdir()
    file.write_text(json.dumps({"settings": {**run.evaluations[0].settings, "checkpoint": "run", "output": "x"}}))
    assert is_done(run, run.evaluations[0])
    assert not is_done(other, other.evaluations[0])
    file.write_text(json.dumps({"settings": {}}))
    assert not is_done(run, run.evaluations[0])


@pytest.mark.long
def test_a_study_with_protocols_trains_them_once_and_again_with_other_settings(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tiny = [word for key, value in TINY.items() if key != "predictor.embed_dim" for word in (f"--{key}", str(value))]
    own = ["widths", "demo", "--jobs", "2", "--bank.num-images", "3", "--bank.num-views", "8", "--out", str(out)]
    training = ["--data.shards", str(tiny_shards), "--schedule.steps", "5", "--log.no-tensorboard", *tiny]
    monkeypatch.setitem(STUDIES, "widths", widths)
    short = ["--batch-size", "20", "--micro-batch-size", "None", "--warmup-epochs", "0", "--data.num-threads", "1"]

    def ablate(steps: int, *more: str) -> str:
        protocols = ["--", "linear", "--steps", str(steps), *short, *more]
        main([*own, "--", *training, *protocols])
        return capsys.readouterr().out

    first = ablate(3)
    assert first.count("trained in") == 2
    assert re.search(r"Linear probing\s", first)
    files = {path: path.stat().st_mtime_ns for path in out.rglob("eval/*.json")}
    assert len(files) == 6
    assert ablate(3).count("already finished, skipped") == 2
    assert files == {path: path.stat().st_mtime_ns for path in files}

    finetuning = ["--", "finetune-predictor", "--steps", "2", *short, "--crops.rand-augment", "None"]
    ablate(4, *finetuning)
    for path, before in files.items():
        assert (path.stat().st_mtime_ns == before) == (path.stem != "study-linear"), path
    record = json.loads((out / "ablation.json").read_bytes())
    assert record["protocols"]["linear"][:2] == ["--steps", "4"]
    for found in record["results"]:
        evaluations = found["evaluations"]
        assert evaluations["study-linear"]["steps"] == 4
        assert {trial["predictor"] for trial in evaluations["study-finetune-predictor"]["trials"].values()} == {
            "pretrained"
        }
    assert record["correlation"]["ours"] == {"linear": None, "finetune-predictor": None}
    page = (out / "report.html").read_text()
    assert "MRR and accuracy (figure 4)" in page
    assert "Predictor finetuning, frozen encoder" in (out / "tables.md").read_text()

"""The paper's tables show ours only where something was run, the best settings, and mean and spread over seeds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from iwm.evaluation import paper_results
from iwm.evaluation.result_table import ResultTable
from iwm.report.paper_tables import markdown, paper_tables
from iwm.report.runs import ReportError
from tests.downstream.written_results import predictor, result, run, top1, trial
from tests.evaluation.printed import assert_whole


def titled(made: list[ResultTable], start: str) -> ResultTable:
    [grid] = [grid for grid in made if grid.title.startswith(f"{start}:")]
    return grid


def rows(table: ResultTable) -> dict[str, list[str]]:
    return {name: cells for name, *cells in table.rows}


OURS = "ours: x, IWM 18×384, 300 epochs; imagenet"


def test_probes_show_the_best_learning_rate_below_the_papers_rows(tmp_path: Path) -> None:
    linear = result("linear", trial(0.40, lr=1.6), trial(0.525, lr=6.4), trial(0.9, features="student"))
    attentive = result("attentive", trial(0.61, rate=None), epochs=28.0)
    made = paper_tables([run(tmp_path / "x", linear=linear, attentive=attentive)])
    assert [grid.title.split(":")[0] for grid in made] == ["Table 5", "Table 8", "Table S5"]
    table = titled(made, "Table 8")
    assert table.columns == ["", "linear", "attentive"]
    assert rows(table)["paper: MAE, 1,600 epochs"] == ["68.0", "76.0"]
    assert rows(table)[OURS] == ["52.5 ± 1.0", "61.0 ± 1.0"]
    assert len(rows(table)) == len(paper_results.TABLE_8) + 1
    assert "linear on imagenet: ViT 12×768" in table.caption
    assert "10 classes (chance 10.0), 5,000 training and 400 held-out images, 90 epochs" in table.caption
    assert "batch 1,024, 1,234 images/s in training." in table.caption
    assert "28 epochs, batch 1,024." in table.caption
    assert rows(titled(made, "Table 5"))[OURS] == ["61.0 ± 1.0 (attentive)", ""]


def test_seeds_give_mean_and_sample_deviation_and_a_paired_gain(tmp_path: Path) -> None:
    trials = [predictor("random", mean, seed) for seed, mean in enumerate((0.50, 0.52, 0.54))]
    trials += [predictor("pretrained", mean, seed) for seed, mean in enumerate((0.55, 0.56, 0.57))]
    trials += [predictor("pretrained", 0.99, actions="random"), predictor("pretrained", 0.30, lr=0.1)]
    made = paper_tables([run(tmp_path / "x", tuned=result("finetune-predictor", *trials))])
    for name in ("Table 4", "Table S1"):
        assert rows(titled(made, name))[OURS] == ["", "52.0 ± 2.0, 3 seeds", "56.0 ± 1.0, 3 seeds (+4.0 ± 1.0)", ""]
    assert rows(titled(made, "Table S1"))["paper: DINO, 1,600 epochs"] == ["82.8", "82.0", "", "82.1"]
    assert rows(titled(made, "Table 4"))["paper: I-JEPA, 300 epochs"] == ["83.0", "79.1", "80.0 (+0.9)", "82.0"]


def test_seeds_of_several_files_belong_together_only_where_all_else_is_the_same(tmp_path: Path) -> None:
    same = [
        result("attentive", trial(mean, seed), settings={"cache_features": False, "seed": seed})
        for seed, mean in enumerate((0.5, 0.6))
    ]
    longer = result("attentive", trial(0.1, 2), epochs=300.0)
    older = result("attentive", trial(0.2, 3), checkpoint="step-000100.pt")
    kept = result("attentive", trial(0.3, 0), settings={"cache_features": True, "seed": 0})
    folder = run(tmp_path / "x", a=same[0], b=same[1], c=longer, d=older, e=kept)
    assert rows(titled(paper_tables([folder]), "Table 8"))[OURS] == ["", "55.0 ± 7.1, 2 seeds"]


def test_finetuning_of_encoders_and_peaks_over_protocols(tmp_path: Path) -> None:
    folder = run(
        tmp_path / "x",
        attentive=result("attentive", trial(0.60)),
        encoder=result("finetune-encoder", trial(0.70)),
        predictor=result("finetune-predictor", predictor("pretrained", 0.65)),
        both=result("finetune-end-to-end", predictor("pretrained", 0.68)),
    )
    made = paper_tables([folder])
    assert rows(titled(made, "Table 4"))[OURS] == ["70.0 ± 1.0", "", "65.0 ± 1.0", "68.0 ± 1.0"]
    assert rows(titled(made, "Table 5"))[OURS] == ["65.0 ± 1.0 (finetune-predictor)", "70.0 ± 1.0 (finetune-encoder)"]


def test_prediction_tasks_stand_beside_the_papers_where_two_can_be_compared(tmp_path: Path) -> None:
    default = predictor("pretrained", 0.50, actions="random", features="student")
    teacher = predictor("pretrained", 0.52, actions="random")
    null = predictor("pretrained", 0.515)
    folder = run(tmp_path / "x", tuned=result("finetune-predictor", default, teacher, null))
    alone = run(tmp_path / "y", tuned=result("finetune-predictor", null))
    made = paper_tables([folder, alone])
    table = titled(made, "Table 3")
    assert table.columns == ["", "paper", OURS]
    assert rows(table) == {
        "Default": ["82.9", "50.0 ± 1.0"],
        "+ Teacher": ["83.2 (+0.3)", "52.0 ± 1.0 (+2.0)"],
        "+ Null latents": ["83.3 (+0.1)", "51.5 ± 1.0 (-0.5)"],
        "+ Pred only one token": ["82.8 (-0.5)", ""],
    }
    complete = titled(made, "Table S3")
    assert len(rows(complete)) == 8
    assert rows(complete)["random latents, teacher, whole image"] == ["83.2", "52.0 ± 1.0"]
    assert rows(complete)["null latents, student, one token"] == ["82.6", ""]


def test_multitask_shows_each_task_its_difference_and_the_average_of_whole_rows(tmp_path: Path) -> None:
    tasks = {
        name: {"shards": f"/data/{name}", "label": "label", "classes": 5, "train_images": 50, "val_images": 20}
        for name in ("inat18", "sun397")
    }
    trials = {
        "multitask": {"lr": 0.001, "seed": 0, "scores": {"inat18": top1(0.5), "sun397": top1(0.8)}},
        "single-inat18": {"lr": 0.001, "seed": 0, "scores": {"inat18": top1(0.6)}},
        "single-sun397": {"lr": 0.001, "seed": 0, "scores": {"sun397": top1(0.75)}},
    }
    folder = run(tmp_path / "x", multitask=result("multitask", tasks=tasks) | {"trials": trials})
    shown = rows(titled(paper_tables([folder]), "Table 7"))
    ours = "ours: x, IWM 18×384, 300 epochs"
    assert shown["paper: SUN397"] == ["75.6", "78.2", "+2.6"]
    assert shown[f"{ours}: inat18"] == ["60.0 ± 1.0", "50.0 ± 1.0", "-10.0"]
    assert shown[f"{ours}: Average"] == ["67.5", "65.0", "-2.5"]
    del trials["single-sun397"]
    cut = run(tmp_path / "cut" / "x", multitask=result("multitask", tasks=tasks) | {"trials": trials})
    shown = rows(titled(paper_tables([cut]), "Table 7"))
    assert shown[f"{ours}: sun397"] == ["", "80.0 ± 1.0", ""]
    assert f"{ours}: Average" not in shown


def test_segmentation_shows_the_parts_that_were_tuned(tmp_path: Path) -> None:
    trials = {
        part: {"lr": 1e-5, "seed": 0, "part": part, "miou": {"mean": mean}, "per_class": [0.1]}
        for part, mean in (("encoder", 0.31), ("end-to-end", 0.35))
    }
    folder = run(tmp_path / "x", segmentation=result("segmentation", label=None) | {"trials": trials})
    assert rows(titled(paper_tables([folder]), "Table 6"))[OURS] == ["31.0", "", "35.0"]


def test_a_large_encoder_is_set_beside_the_papers_large_ones(tmp_path: Path) -> None:
    large = {"format": "mae", "description": "ViT 24×1024, patch 16, 224 px"}
    folder = run(tmp_path / "mae_large", None, tuned=result("finetune-encoder", trial(0.7), encoder=large))
    made = paper_tables([folder])
    assert [grid.title for grid in made] == ["Table S4: ViT-L/16"]
    assert rows(made[0])["paper: IWM-Equi 36×512, 300 epochs"] == ["83.7", "85.0", "85.4"]
    assert rows(made[0])["ours: mae_large, MAE; imagenet"] == ["70.0 ± 1.0", "", ""]


def test_data_sets_of_a_run_stand_in_one_row_and_unknown_ones_in_columns_of_their_own(tmp_path: Path) -> None:
    def on(shards: str, label: str, mean: float) -> dict[str, Any]:
        return result("attentive", trial(mean), data={"shards": shards, "split": "val"}, label=label)

    folder = run(
        tmp_path / "x",
        a=on("/d/inat18", "label", 0.2),
        b=on("/d/demo/shards", "label", 0.3),
        c=on("/d/demo/shards", "colour", 0.4),
    )
    table = titled(paper_tables([folder]), "Table S5")
    assert table.columns == ["", "ImageNet", "iNat18", "SUN397", "Places205", "demo", "demo colour"]
    ours = ["", "20.0 ± 1.0", "", "", "30.0 ± 1.0", "40.0 ± 1.0"]
    assert rows(table)["ours: x, IWM 18×384, 300 epochs"] == ours
    assert rows(table)["paper: MAE, 300 epochs"] == ["73.5", "50.1", "70.2", "60.3", "", ""]


def test_every_table_is_whole_in_a_terminal_of_80_columns(tmp_path: Path) -> None:
    seeds = [predictor(kind, 0.5 + seed / 50, seed) for kind in ("random", "pretrained") for seed in (0, 1, 2)]
    tasks = {
        name: {"shards": f"/data/{name}", "label": "label", "classes": 5, "train_images": 50, "val_images": 20}
        for name in ("inat18", "places205")
    }
    single = {"lr": 0.001, "seed": 0, "scores": {"inat18": top1(0.6)}}
    both = {"lr": 0.001, "seed": 0, "scores": {name: top1(0.7) for name in tasks}}
    parts = {part: {"lr": 1e-5, "seed": 0, "part": part, "miou": {"mean": 0.31}} for part in ("encoder", "predictor")}
    results = {
        "linear": result("linear", trial(0.525)),
        "attentive": result("attentive", trial(0.61), trial(0.62, 1)),
        "predictor": result("finetune-predictor", *seeds, predictor("pretrained", 0.5, actions="random")),
        "encoder": result("finetune-encoder", trial(0.7)),
        "both": result("finetune-end-to-end", predictor("pretrained", 0.68)),
        "multitask": result("multitask", tasks=tasks) | {"trials": {"multitask": both, "single-inat18": single}},
        "segmentation": result("segmentation", label=None) | {"trials": parts},
    }
    large = {"format": "mae", "description": "ViT 24×1024, patch 16, 224 px"}
    folders = [run(tmp_path / name, **results) for name in ("a", "run-of-many-seeds_and_long-name")]
    folders.append(run(tmp_path / "mae_large", None, tuned=result("finetune-encoder", trial(0.7), encoder=large)))
    made = paper_tables(folders)
    assert len(made) == 10
    for table in made:
        assert_whole(table)


def test_arms_that_diverged_and_other_evaluations_are_left_out(tmp_path: Path) -> None:
    diverged = {**trial(0.9), "top1": None}
    other = {"protocol": "mrr", "mrr": {}}
    folder = run(tmp_path / "x", linear=result("linear", diverged, trial(0.4)), mrr=other)
    assert rows(titled(paper_tables([folder]), "Table 8"))[OURS] == ["40.0 ± 1.0", ""]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    nothing = run(tmp_path / "nothing", mrr={"protocol": "mrr"})
    with pytest.raises(ReportError, match=r"nothing: no downstream results .* linear --checkpoint"):
        paper_tables([nothing])
    cut = run(tmp_path / "cut", linear={"protocol": "linear", "trials": {}})
    with pytest.raises(ReportError, match=r"cut/eval/linear\.json is not a complete linear result"):
        paper_tables([cut])
    with pytest.raises(ReportError, match="is not a folder"):
        paper_tables([tmp_path / "gone"])
    wrong = run(tmp_path / "wrong", "views: 3\n", linear=result("linear", trial(0.4)))
    with pytest.raises(ReportError, match=r"wrong/config\.yaml"):
        paper_tables([wrong])


def test_the_command_prints_the_tables_and_writes_them_as_markdown(tmp_path: Path) -> None:
    folder = run(tmp_path / "x", linear=result("linear", trial(0.525)))
    written = tmp_path / "tables.md"
    done = _command("--runs", folder, "--markdown", written)
    assert done.returncode == 0
    assert "Table 8: linear and attentive probing" in done.stdout
    assert "52.5 ± 1.0" in done.stdout
    assert f"| {OURS} | 52.5 ± 1.0 |  |" in written.read_text() == markdown(paper_tables([folder]))


def test_the_command_ends_with_one_line_where_there_is_nothing_to_show(tmp_path: Path) -> None:
    done = _command("--runs", run(tmp_path / "empty"))
    assert done.returncode == 1
    assert re.fullmatch(r"iwm/evaluate.py: .*empty: no downstream results .*\n", done.stderr)


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[2] / "iwm" / "evaluate.py"
    command = [sys.executable, str(script), "table", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"})

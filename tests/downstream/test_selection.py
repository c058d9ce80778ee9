"""Trial and epoch are chosen on training images that are held out: never trained on, the same on every run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iwm.config import ConfigError
from iwm.downstream import experiment
from iwm.downstream.progress import TrainPlan
from iwm.report.results import best_trials, read_dataset_results
from iwm.report.runs import read_run
from shards.hold_out import key_position
from tests.downstream import written_results
from tests.training.runs import finish

Leverage = Callable[..., Any]

SEGMENTATION = {"classes": 4, "reduce_zero_label": False, "channels": 8}


def curve(run: Path, name: str) -> list[dict[str, float]]:
    """Return the lines of evaluations in metrics.jsonl."""
    lines = (run / f"eval/{name}/metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if any(key.startswith("selection/") for key in line)]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[TrainPlan]:
    """Return a list that each training's plan is appended to."""
    kept: list[TrainPlan] = []
    trained = experiment.train

    def train(plan: TrainPlan, *rest: Any) -> Any:
        kept.append(plan)
        return trained(plan, *rest)

    monkeypatch.setattr(experiment, "train", train)
    return kept


@pytest.mark.parametrize("cached", [False, True])
def test_trial_and_epoch_are_the_best_on_held_out_training_images(
    leverage: Leverage, run: Path, plans: list[TrainPlan], cached: bool
) -> None:
    options = {"steps": 30, "validate_every": 0.5, "selection_share": 0.25, "cache_features": cached}
    result = leverage("linear", lr=(30.0, 300.0, 3000.0), **options)
    assert (result["selection"], result["selection_images"], result["train_images"]) == ("train", 30, 90)
    lines = curve(run, "linear")
    reached = {name: [line[f"selection/top1/{name}"] for line in lines] for name in result["trials"]}
    scores = [share for shares in reached.values() for share in shares]
    assert len(set(scores)) > 5, "nothing is told apart"
    assert {round(30 * share, 6) % 1 for share in scores} == {0}, "another number of images"
    best = torch.load(run / "eval/linear/best.pt", weights_only=True)
    place = reached[best["trial"]].index(max(scores))
    assert best["trial"] == result["chosen"]
    assert best["scores"]["label"]["top1"] == lines[place][f"top1/{best['trial']}"], "not that on the held-out split"
    for name, trial in result["trials"].items():
        at = reached[name].index(max(reached[name]))
        assert trial["best"]["selection"] == reached[name][at]
        assert trial["best"]["score"] == lines[at][f"top1/{name}"]
        assert trial["top1"]["mean"] == lines[-1][f"top1/{name}"]
    study, number = plans[0].study.eval(), list(result["trials"]).index(best["trial"])
    study.trials[number].load_state_dict(best["state"])
    assert plans[0].tasks[0].evaluate(study, 0, [number], "selection")[0]["top1"] == max(scores)
    assert "30 training images, which are not trained on" in json.dumps(result["tables"])


def test_the_pages_best_trial_is_the_one_that_was_chosen(leverage: Leverage, run: Path) -> None:
    """Chosen by its selection score, also where another trial is better on the held-out split."""
    result = leverage("linear", lr=(30.0, 300.0), steps=6, output=run / "eval/probe.json")
    trials = list(result["trials"].values())
    trials[0]["best"]["selection"], trials[1]["best"]["selection"] = 0.9, 0.1
    trials[0]["top1"]["mean"], trials[1]["top1"]["mean"] = 0.3, 0.8
    file = run / "eval/probe.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trials": result["trials"]}))

    def shown() -> float:
        (dataset,) = read_dataset_results(read_run(run))
        best = best_trials(dataset.records, "linear", lambda trial: True)
        assert best is not None
        return best.mean

    assert shown() == 0.3
    # An older result, or one of --selection val, has no selection scores.
    for trial in trials:
        del trial["best"]["selection"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trials": result["trials"]}))
    assert shown() == 0.8


def test_what_is_held_out_is_never_trained_on_and_is_the_same_in_every_protocol(
    leverage: Leverage, boxes: Path, plans: list[TrainPlan]
) -> None:
    leverage("linear", lr=(1.0, 2.0), selection_share=0.1, seed=0)
    leverage("finetune-encoder", lr=(1e-4, 1e-3), selection_share=0.1, seed=5)
    leverage("segmentation", lr=(1e-5, 2e-5), selection_share=0.1, **SEGMENTATION)
    names = [
        line.split()[3] for index in sorted(boxes.glob("train-*.idx")) for line in index.read_text().splitlines()[1:]
    ]
    keys = [name.partition(".")[0] for name in names]
    expected = sorted(keys, key=key_position)[:12]
    for plan in plans:
        task: Any = plan.tasks[0]
        held: set[str] = set()
        for batch in task._held_out["selection"]:
            held |= set(batch.keys) if hasattr(batch, "keys") else {batch.key}
        seen = {key for _ in range(12) for key in next(task._loader).keys}
        assert held == set(expected)
        assert seen <= set(keys) - held
        assert task.images == 108


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"lr": (30.0,)}),
        ("finetune-encoder", {"seeds": (0, 1)}),
        ("linear", {"lr": (30.0,), "encoder": ("teacher", "student")}),
        ("segmentation", {"lr": (1e-3,), **SEGMENTATION}),
    ],
)
def test_without_a_choice_all_images_are_trained_on_and_the_last_epoch_is_the_best(
    leverage: Leverage, run: Path, name: str, options: dict[str, Any]
) -> None:
    result = leverage(name, steps=18, **options)
    assert (result["selection"], result["train_images"]) == ("none", 120)
    assert "selection_images" not in result
    best, last = (torch.load(run / f"eval/{name}/{file}.pt", weights_only=True) for file in ("best", "last"))
    assert best["epoch"] == pytest.approx(18 * 20 / 120)
    assert result["chosen"] == best["trial"] == next(iter(result["trials"]))
    for key, value in best["state"].items():
        assert torch.equal(value, last["trials"][f"0.{key}"])


def test_every_task_of_several_has_its_images(leverage: Leverage) -> None:
    options = {"tasks": ("label", "side"), "cache_features": True, "lr": (1e-3, 1e-2)}
    result = leverage("multitask", **options)
    assert {task["selection_images"] for task in result["tasks"].values()} == {6}
    assert len(result["trials"]) == 6
    assert result["chosen"].startswith("multitask, "), "a control is not chosen"


def test_segmentation_is_chosen_by_miou(leverage: Leverage, run: Path) -> None:
    result = leverage("segmentation", lr=(1e-3, 1e-2), steps=12, batch_size=20, selection_share=0.1, **SEGMENTATION)
    assert (result["selection_images"], result["train_images"], result["val_images"]) == (12, 108, 48)
    lines = curve(run, "segmentation")
    for name, trial in result["trials"].items():
        assert trial["best"]["selection"] == max(line[f"selection/miou/{name}"] for line in lines)


def test_two_processes_choose_on_the_same_images(leverage: Leverage, run: Path) -> None:
    """One process then evaluates what two processes trained: the counts are the same."""
    words = "--steps 4 --batch-size 20 --micro-batch-size None --lr 10 100 --validate-every 1 --selection-share 0.1"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finish(
        [*launcher, "iwm/evaluate.py", "linear", "--checkpoint", str(run), "--data.num-threads", "1", *words.split()]
    )
    two = json.loads((run / "eval/linear.json").read_text())
    assert (two["processes"], two["train_images"], two["selection_images"]) == (2, 108, 12)
    best = {name: trial["best"]["selection"] for name, trial in two["trials"].items()}
    assert all(round(12 * share, 6) % 1 == 0 for share in best.values())


@pytest.mark.parametrize("share", [0.999, 1e-9])
def test_a_share_that_leaves_too_little_is_told_and_a_small_one_holds_out_an_image(
    leverage: Leverage, share: float
) -> None:
    if share < 0.5:
        assert leverage("linear", lr=(1.0, 2.0), steps=1, selection_share=share)["selection_images"] == 1
        return
    with pytest.raises(ConfigError, match=r"--selection-share 0.999: 120 of 120 images of 'train' are held out"):
        leverage("linear", lr=(1.0, 2.0), steps=1, selection_share=share)


@pytest.mark.parametrize(("rate", "columns"), [(None, ["parameters"]), (1234.4, ["parameters", "images/s"])])
def test_the_speed_of_trials_has_a_column_where_it_was_measured(rate: float | None, columns: list[str]) -> None:
    result = written_results.result("linear", written_results.trial(0.5, rate=rate), selection="none")
    (table,) = experiment.trials_tables(result)
    assert table.columns[3:] == columns
    assert table.rows[0][3:] == ["100", *(["1,234"] if rate else [])]

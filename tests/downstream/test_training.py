"""Trials train as if alone; resumed trainings are exact; processes and passes do not change the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from iwm import protocols
from iwm.downstream import experiment
from iwm.downstream.cached_features import CachedFeatures
from iwm.downstream.progress import TrainPlan
from iwm.training.runtime import StopFlag
from tests.downstream.resident import trajectory
from tests.training.runs import alone, assert_same, finish, start, wait_until

Leverage = Callable[..., Any]

MEASURED = {"images_per_second", "data_wait", "memory_gib", "checkpoint_pause"}
"""Fields that may differ between two runs of the same training."""


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def arm_of(last: dict[str, Any], number: int) -> dict[str, Tensor]:
    """Return a trial's tensors in last.pt."""
    head = f"{number}."
    return {name.removeprefix(head): value for name, value in last["trials"].items() if name.startswith(head)}


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without measured fields."""
    whole = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in whole]


def learnt(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result's trials without measured fields."""
    return {
        name: {key: value for key, value in trial.items() if key not in MEASURED}
        for name, trial in result["trials"].items()
    }


@pytest.mark.parametrize(
    ("name", "together", "apart"),
    [
        (
            "linear",
            {"lr": (1.0, 10.0), "encoder": ("student", "teacher")},
            {"lr": (10.0,), "encoder": ("teacher",)},
        ),
        (
            "finetune-predictor",
            {"seeds": (0, 1), "actions": ("null", "random")},
            {"predictors": ("random",), "seeds": (1,), "actions": ("random",)},
        ),
        ("finetune-encoder", {"seeds": (0, 1)}, {"seeds": (1,)}),
    ],
)
def test_an_arm_among_others_ends_bit_for_bit_as_alone(
    leverage: Leverage, run: Path, name: str, together: dict[str, Any], apart: dict[str, Any]
) -> None:
    """Drop path, mixup and sampled actions are included. The single trial is the last of the joint trials."""
    among = leverage(name, selection="val", **together)
    single = leverage(name, selection="val", output=run / "eval/apart.json", **apart)
    count = len(among["trials"])
    assert count > len(single["trials"]) == 1
    one = arm_of(load(run / "eval/apart/last.pt"), 0)
    assert_same(arm_of(load(run / f"eval/{name}/last.pt"), count - 1), one)
    assert learnt(among).popitem()[1] == learnt(single).popitem()[1]
    assert any(not torch.equal(value, one[key]) for key, value in arm_of(load(run / f"eval/{name}/last.pt"), 0).items())


def test_an_arm_that_diverges_disturbs_no_other_and_no_file(leverage: Leverage, run: Path) -> None:
    result = leverage("linear", lr=(1.0, 1e30), selection="val")
    single = leverage("linear", lr=(1.0,), selection="val", output=run / "eval/apart.json")
    sane, absurd = result["trials"].values()
    assert absurd["skipped_steps"] > 0
    assert sane["skipped_steps"] == 0
    assert learnt(result)["teacher, lr 1"] == learnt(single)["teacher, lr 1"]
    assert_same(arm_of(load(run / "eval/linear/last.pt"), 0), arm_of(load(run / "eval/apart/last.pt"), 0))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((run / "eval/linear.json").read_text(), parse_constant=refuse)
    for line in (run / "eval/linear/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_batch_that_breaks_a_step_stays_in_no_running_mean(
    monkeypatch: pytest.MonkeyPatch, leverage: Leverage, run: Path
) -> None:
    """The features of step 3 are infinite; the running means of the head's norm must stay finite."""
    given = CachedFeatures.get_batch

    def broken(task: CachedFeatures, number: int) -> tuple[Any, Tensor]:
        shared, targets = given(task, number)
        return ({name: tokens * torch.inf for name, tokens in shared.items()} if number == 2 else shared), targets

    monkeypatch.setattr(CachedFeatures, "get_batch", broken)
    (trial,) = leverage("attentive", cache_features=True)["trials"].values()
    assert trial["skipped_steps"] == 1
    state = arm_of(load(run / "eval/attentive/last.pt"), 0)
    assert all(value.isfinite().all() for value in state.values())
    assert state["head.bn.num_batches_tracked"] == 5


@contextmanager
def stopping_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the stop flag in step `steps`."""

    class After(StopFlag):
        calls = 0

        def __bool__(self) -> bool:
            self.calls += 1
            return self.calls >= steps

    @contextmanager
    def stop_flag() -> Iterator[StopFlag]:
        yield After()

    with monkeypatch.context() as patch:
        patch.setattr(protocols, "stop_on_signal", stop_flag)
        yield


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"lr": (1.0, 30.0), "micro_batch_size": 10}),
        ("finetune-encoder", {"lr": (1e-2,)}),
        ("multitask", {"tasks": ("label", "side"), "cache_features": True, "lr": (1e-2,)}),
    ],
)
def test_a_training_that_is_stopped_goes_on_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, leverage: Leverage, run: Path, name: str, options: dict[str, Any]
) -> None:
    options |= {"steps": 16, "log_every": 2, "checkpoint_every": 5}
    whole = leverage(name, output=run / "eval/whole.json", **options)
    for step in (3, 6):  # the second stop is in step 3 + 6
        with stopping_after(step, monkeypatch):
            assert leverage(name, **options) is None
        assert not (run / f"eval/{name}.json").exists()
    cut = leverage(name, **options)
    assert learnt(cut) == learnt(whole)
    one, other = (load(run / f"eval/{folder}/last.pt") for folder in (name, "whole"))
    assert one["progress"]["step"] == 16
    for part in ("trials", "optimizers", "progress"):
        assert_same(one[part], other[part], part)
    # The states of pipelines differ between processes, so they are not compared.
    assert_same(*(load(run / f"eval/{folder}/best.pt")["state"] for folder in (name, "whole")))
    assert_same(*(load(run / f"eval/{folder}/best.pt")["scores"] for folder in (name, "whole")))
    curves = [lines(run / f"eval/{folder}") for folder in (name, "whole")]
    for kind in ("loss", "top1"):
        steps, expected = ([line["step"] for line in curve if kind in line] for curve in curves)
        assert steps == sorted({*expected, *([3, 9] if kind == "loss" else [])})
    # A stop shortens the window of its line; later lines are the same.
    late = [[line for line in curve if line["step"] > 10] for curve in curves]
    assert late[0] == late[1]


def test_a_finished_training_given_again_is_judged_and_not_trained(leverage: Leverage, run: Path) -> None:
    first = leverage("linear", lr=(1.0, 10.0))
    before = load(run / "eval/linear/last.pt")
    again = leverage("linear", lr=(1.0, 10.0))
    assert learnt(again) == learnt(first)
    assert again["val_images"] == 48
    assert_same(load(run / "eval/linear/last.pt")["trials"], before["trials"])


def test_best_is_the_best_epoch_of_the_best_arm(monkeypatch: pytest.MonkeyPatch, leverage: Leverage, run: Path) -> None:
    plans: list[TrainPlan] = []
    trained = experiment.train

    def kept(plan: TrainPlan, *rest: Any) -> Any:
        plans.append(plan)
        return trained(plan, *rest)

    monkeypatch.setattr(experiment, "train", kept)
    result = leverage("linear", lr=(30.0, 300.0, 3000.0), steps=30, validate_every=0.5, selection="val")
    curve = [line for line in lines(run / "eval/linear") if "top1" in line]
    assert len(curve) == 10
    reached = {name: [line[f"top1/{name}"] for line in curve] for name in result["trials"]}
    best = load(run / "eval/linear/best.pt")
    top = max(max(scores) for scores in reached.values())
    assert max(reached[best["trial"]]) == best["scores"]["label"]["top1"] == top
    assert best["trial"] == result["chosen"]
    place = reached[best["trial"]].index(top)
    assert best["epoch"] == pytest.approx(curve[place]["step"] / 6)
    assert len({score for scores in reached.values() for score in scores}) > 5, "nothing is told apart"
    for name, trial in result["trials"].items():
        assert trial["best"]["score"] == max(reached[name])
        assert trial["top1"]["mean"] == reached[name][-1]
    study, number = plans[0].study.eval(), list(result["trials"]).index(best["trial"])
    study.trials[number].load_state_dict(best["state"])
    assert plans[0].tasks[0].evaluate(study, 0, [number])[0]["top1"] == top


def test_two_passes_and_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    expected = trajectory(tmp_path / "one", alone(), 1)["state"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output = finish([*launcher, "tests/downstream/resident.py", str(tmp_path), "2"])
    assert "Warning" not in output
    two = load(tmp_path / "ended.pt")
    assert two["apart"] == [0.0] * 5, "processes judge with other parameters or means"
    for shared in (two, trajectory(tmp_path / "passes", alone(), 2)):
        assert shared["state"].keys() == expected.keys()
        for name, value in expected.items():
            one, other = shared["state"][name], value
            if name.endswith("qkv.bias"):
                # The gradient of a key's bias is only rounding, which Adam amplifies; softmax is invariant to the bias.
                one, other = (torch.cat((bias.chunk(3)[0], bias.chunk(3)[2])) for bias in (one, other))
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for trial in ("probe", "encoder", "predictor"):
        losses = [
            [line[f"loss/{trial}"] for line in lines(folder) if "loss" in line]
            for folder in (tmp_path / "one", tmp_path, tmp_path / "passes")
        ]
        assert len(losses[0]) == 4
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def command(run: Path, name: str, *words: str, processes: int = 0) -> list[str]:
    head = [sys.executable]
    if processes:
        head += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*head, "iwm/evaluate.py", name, "--checkpoint", str(run), "--data.num-threads", "1", *words]


def test_two_processes_count_every_held_out_image_once_as_one_would(leverage: Leverage, run: Path) -> None:
    """The same command on one process only evaluates the parameters (and batch norms) of the two processes."""
    options: dict[str, Any] = {"steps": 6, "batch_size": 20, "lr": (1e-3, 1e-2), "validate_every": 1.0}
    words = ["--steps", "6", "--batch-size", "20", "--lr", "1e-3", "1e-2", "--validate-every", "1"]
    finish(command(run, "attentive", *words, processes=2))
    two = json.loads((run / "eval/attentive.json").read_text())
    assert two["processes"] == 2
    assert two["val_images"] == 48
    ranks = load(run / "eval/attentive/last.pt")["ranks"]
    assert [rank["tasks"][0]["rank"] for rank in ranks] == [0, 1]
    one = leverage("attentive", **options)
    assert one["processes"] == 1
    assert learnt(one) == learnt(two)
    assert one["chance"] == two["chance"]


def test_kill_9_and_the_same_settings_again_end_as_if_nothing_had_been(
    leverage: Leverage, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "steps": 120,
        "batch_size": 20,
        "lr": (1.0, 10.0),
        "log_every": 5,
        "checkpoint_every": 10,
    }
    whole = leverage("linear", output=run / "eval/whole.json", warmup_epochs=10.0, **options)
    words = ["--steps", "120", "--batch-size", "20", "--lr", "1", "10", "--log-every", "5", "--checkpoint-every", "10"]
    words += ["--warmup-epochs", "10", "--validate-every", "1", "--micro-batch-size", "None"]
    killed = start(command(run, "linear", *words))
    wait_for_step(run / "eval/linear", 25, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (run / "eval/linear.json").exists()
    again = leverage("linear", warmup_epochs=10.0, **options)
    assert "resuming from step" in capfd.readouterr().out
    assert learnt(again) == learnt(whole)
    assert lines(run / "eval/linear") == lines(run / "eval/whole")


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    path, marks = folder / "metrics.jsonl", [f'"step": {number},' for number in range(step, step + 40)]
    wait_until(lambda: path.exists() and any(mark in path.read_text() for mark in marks), process)

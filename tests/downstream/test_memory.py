"""The memory of a pass is that of one trial; checkpointing reduces it bit for bit; the micro-batch size fits it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iwm.config import ConfigError
from iwm.downstream import cost, micro_batch
from iwm.downstream.cost import MemoryNeed, memory_need
from iwm.downstream.micro_batch import largest_fitting
from iwm.downstream.progress import TrainPlan
from tests.downstream.saved import CLASSES, all_at_once, plan_of, saved, small
from tests.downstream.test_training import learnt, load, stopping_after
from tests.training.runs import assert_same

Leverage = Callable[..., Any]


@pytest.mark.parametrize("kind", ["predictor", "encoder"])
def test_several_arms_keep_no_more_for_backward_than_one(kind: str) -> None:
    one = saved(plan_of(small(), 1, images=2, kind=kind))
    for trials in (2, 4, 8):
        assert saved(plan_of(small(), trials, images=2, kind=kind)) == one
        together = saved(plan_of(small(), trials, images=2, kind=kind), all_at_once)
        # Trials share the frozen features and the mean of a soft target.
        assert 0.9 * trials * one < together <= trials * one


def test_arm_by_arm_gradients_are_bit_for_bit_those_of_all_at_once() -> None:
    plans = [plan_of(small(), 3, images=4) for _ in range(2)]
    saved(plans[0])
    saved(plans[1], all_at_once)
    gradients = [
        {name: p.grad for name, p in plan.study.trials.named_parameters() if p.requires_grad} for plan in plans
    ]
    assert_same(gradients[0], gradients[1])


@pytest.mark.parametrize("kind", ["predictor", "encoder"])
def test_checkpointing_keeps_much_less(kind: str) -> None:
    plain, recomputed = (
        saved(plan_of(small(), 2, images=2, kind=kind, grad_checkpointing=grad_checkpointing))
        for grad_checkpointing in (False, True)
    )
    assert recomputed < 0.4 * plain


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("finetune-encoder", {"drop_path": 0.5}),
        ("finetune-predictor", {"drop_path": 0.5, "outputs": ("image", "token")}),
        ("finetune-end-to-end", {"drop_path": 0.5}),
        ("multitask", {"drop_path": 0.5, "tasks": ("label", "side")}),
        (
            "segmentation",
            {
                "drop_path": 0.5, "classes": 4, "reduce_zero_label": False, "channels": 8, "lr": (1e-3,),
                "parts": ("encoder", "predictor", "end-to-end"),
            },
        ),
    ],
)  # fmt: skip
def test_checkpointing_from_the_command_line_changes_no_bit(
    leverage: Leverage, run: Path, name: str, options: dict[str, Any]
) -> None:
    plain = leverage(name, **options)
    recomputed = leverage(name, output=run / "eval/recomputed.json", activation_checkpointing=True, **options)
    assert learnt(plain) == learnt(recomputed)
    states = [load(run / f"eval/{folder}/last.pt") for folder in (name, "recomputed")]
    for part in ("trials", "optimizers"):
        assert_same(states[0][part], states[1][part], part)


def example_of(plan: TrainPlan) -> Any:
    """Return a function that makes batches of any number of the plan's images."""
    images, _ = plan.tasks[0].get_batch(0)
    return lambda count: (images[:1].repeat(count, 1, 1, 1), [torch.full((count, CLASSES), 1 / CLASSES)])


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["predictor", "encoder"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_need_of_few_images_says_that_of_many(kind: str, grad_checkpointing: bool, bf16: bool) -> None:
    plan = plan_of(small(), 2, images=1, kind=kind, grad_checkpointing=grad_checkpointing)
    example = example_of(plan)
    need = memory_need(plan.study, 1, example, share=64, bf16=bf16, cached=False)
    assert need.of(64) == pytest.approx(
        cost._peak(plan.study, plan.study.trial(1), example, 64, bf16, False), rel=0.1 if bf16 else 0.02
    )


@pytest.mark.parametrize("kind", ["predictor", "encoder"])
def test_the_need_holds_what_is_kept_for_backward_and_what_works_beside_it(kind: str) -> None:
    plan = plan_of(small(), 1, images=8, kind=kind)
    need = memory_need(plan.study, 0, example_of(plan), share=64, bf16=False, cached=False)
    assert saved(plan) <= need.of(8) < 1.5 * saved(plan)
    recomputed = plan_of(small(), 1, images=8, kind=kind, grad_checkpointing=True)
    assert (
        memory_need(recomputed.study, 0, example_of(plan), share=64, bf16=False, cached=False).image < 0.6 * need.image
    )


def test_measuring_a_need_leaves_no_trace() -> None:
    plan = plan_of(small(), 1, images=1)
    before, drawn = copy.deepcopy(plan.study.state_dict()), torch.get_rng_state()
    memory_need(plan.study, 0, example_of(plan), share=64, bf16=False, cached=False)
    assert_same(dict(plan.study.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in plan.study.parameters())


def test_the_largest_divisor_that_fits_is_even_where_the_share_is() -> None:
    needs = [MemoryNeed(fixed=100, image=10), MemoryNeed(fixed=0, image=11)]
    assert largest_fitting(512, needs, 100_000) == 512
    assert largest_fitting(512, needs, 11 * 128) == 128
    assert largest_fitting(512, needs, 11 * 128 - 1) == 64
    assert largest_fitting(12, needs, 100 + 10 * 3) == 2
    assert largest_fitting(15, needs, 100 + 10 * 14) == 5
    assert largest_fitting(512, needs, 100) == 0


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, leverage: Leverage, run: Path) -> Callable[[str, int], None]:
    """Return a function that sets the free memory to passes of some images of a protocol: `room("linear", 10)`."""

    def set_free(name: str, images: int) -> None:
        calls: list[tuple[list[MemoryNeed], int]] = []

        def spy(share: int, needs: list[MemoryNeed], left: int) -> int:
            calls.append((needs, left))
            return largest_fitting(share, needs, left)

        with monkeypatch.context() as patch:
            patch.setattr(micro_batch, "largest_fitting", spy)
            patch.setattr(cost, "free_memory", lambda device: 2**40)
            leverage(name, steps=1, output=run / f"eval/room-{name}-{images}.json")
        needs, left = calls[0]
        later = int(micro_batch.MEMORY_FRACTION * 2**40) - left
        free = int((max(need.of(images) for need in needs) + later + 10) / micro_batch.MEMORY_FRACTION)
        monkeypatch.setattr(cost, "free_memory", lambda device: free)

    return set_free


@pytest.mark.parametrize("name", ["attentive", "finetune-encoder", "finetune-predictor"])
def test_the_micro_batch_is_what_fits_and_a_run_says_why(
    room: Callable[[str, int], None], leverage: Leverage, run: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    room(name, 10)
    leverage(name)
    output = capfd.readouterr().out
    assert "--micro-batch-size 10 of 20: the largest trial needs" in output
    assert load(run / f"eval/{name}/last.pt")["micro_batch_state"]["micro_batch_size"] == 10
    room(name, 0)
    with pytest.raises(
        ConfigError, match=r"--micro-batch-size: no size fits: the largest trial needs .* GiB of free memory; "
    ):
        leverage(name, output=run / "eval/none.json")


def test_a_training_that_goes_on_keeps_the_micro_batch_that_was_chosen_when_it_began(
    monkeypatch: pytest.MonkeyPatch,
    room: Callable[[str, int], None],
    leverage: Leverage,
    run: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With free memory for twice as many images, it ends bit for bit as with that micro-batch size throughout."""
    name, options = "finetune-encoder", {"lr": (1e-2,), "steps": 8}
    whole = leverage(name, output=run / "eval/whole.json", micro_batch_size=10, **options)
    room(name, 10)
    with stopping_after(3, monkeypatch):
        assert leverage(name, **options) is None
    monkeypatch.setattr(cost, "free_memory", lambda device: 2**40)
    capfd.readouterr()
    cut = leverage(name, **options)
    assert "--micro-batch-size 10 of 20: as at the start of this training" in capfd.readouterr().out
    assert learnt(cut) == learnt(whole)
    assert_same(*(load(run / f"eval/{folder}/last.pt")["trials"] for folder in (name, "whole")))
    leverage(name, output=run / "eval/anew.json", **options)
    assert "--micro-batch-size 20 of 20: the largest trial needs" in capfd.readouterr().out


def test_on_a_cpu_a_pass_has_the_whole_share(leverage: Leverage, capfd: pytest.CaptureFixture[str]) -> None:
    leverage("linear", lr=(1.0,))
    assert "--micro-batch-size 20 of 20: on a CPU, a process's whole share in one pass" in capfd.readouterr().out

"""Interleaved turns, their statistics, and the bottleneck that follows from them."""

from __future__ import annotations

from mmap import mmap
from typing import Any

import pytest
import torch
from tables import bottleneck, ratios
from timing import Measured, StepTimings, compiled_graphs, forget_peak, interleave, paired_ratio, peak_gib

from iwm.training.distributed import DistEnv
from tests.training.runs import alone


def test_turns_are_taken_in_rounds_and_measurements_last_as_long_as_asked() -> None:
    order: list[tuple[str, int]] = []

    def way(name: str, seconds: float) -> Measured:
        def window(steps: int) -> StepTimings:
            order.append((name, steps))
            return StepTimings([seconds] * steps, cpu_seconds=2 * seconds * steps)

        return Measured(window, images=4)

    rounds: list[int] = []
    reported: list[str] = []
    turns = interleave(
        {"quick": way("quick", 0.01), "slow": way("slow", 0.5)},
        alone(),
        seconds=3.0,
        repeats=2,
        settling=3,
        between=lambda: rounds.append(len(order)),
        status=lambda text: None,
        report=reported.append,
    )
    first = [("quick", 3), ("quick", 3), ("quick", 150), ("slow", 3), ("slow", 3), ("slow", 5)]
    assert order == [*first, ("quick", 3), ("quick", 150), ("slow", 3), ("slow", 5)]
    assert rounds == [6, 10]
    assert reported[:2] == ["turn 1 of 2: quick 400 images/s", "turn 1 of 2: slow 8 images/s"]
    assert len(reported) == 4
    assert [turn.images_per_second for turn in turns["quick"]] == pytest.approx([400, 400])
    assert [turn.images_per_cpu_second for turn in turns["quick"]] == pytest.approx([200, 200])


def test_a_rate_is_that_of_all_processes_together() -> None:
    class Two(DistEnv):
        """DistEnv stand-in of a process next to one that is twice as fast."""

        def all_gather(self, value: Any) -> list[Any]:
            return [value, 2 * value]

    dist = Two(rank=0, size=2, local_rank=0, local_size=2, device=torch.device("cpu"))
    way = Measured(lambda steps: StepTimings([0.01] * steps, cpu_seconds=0.01 * steps), images=4)
    turns = interleave(
        {"way": way},
        dist,
        seconds=1.0,
        repeats=1,
        settling=1,
        between=lambda: None,
        status=lambda text: None,
        report=lambda text: None,
    )
    assert turns["way"][0].images_per_second == pytest.approx(400 + 800)


def test_memory_is_counted_from_where_it_was_forgotten() -> None:
    dist = torch.device("cpu")
    forget_peak(dist)
    before = peak_gib(dist)
    # Not allocated by torch, because its allocator and malloc may keep freed memory.
    with mmap(-1, 2**29) as held:
        for _ in range(2**9):
            held.write(b"1" * 2**20)
        forget_peak(dist)
        assert peak_gib(dist) > before + 0.4
    assert peak_gib(dist) > before + 0.4
    forget_peak(dist)
    assert peak_gib(dist) < before + 0.2


def test_a_recompilation_is_counted() -> None:
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    double(torch.ones(3))
    before = compiled_graphs()
    double(torch.ones(3))
    assert compiled_graphs() == before
    double(torch.ones(4))
    assert compiled_graphs() == before + 1


def test_ratios_are_taken_turn_by_turn() -> None:
    assert paired_ratio([200, 50], [100, 100]) == {"median": 1.25, "lowest": 0.5, "highest": 2.0}
    found = ratios({"data": [300, 30], "model": [100, 10], "interference": [90, 9], "end-to-end": [45, 9]})
    assert found["end_to_end"] == {"median": 0.675, "lowest": 0.45, "highest": 0.9}
    assert found["interference"]["median"] == 0.9
    assert found["starvation"] == {"median": 0.25, "lowest": 0.0, "highest": 0.5}
    assert found["headroom"]["median"] == 3.0


@pytest.mark.parametrize(
    ("rates", "on_gpu", "says"),
    [
        ((5000, 2400, 2350, 2300), True, "the model: alone the pipeline makes 5,000 images/s"),
        ((1500, 2400, 2300, 1450), True, "the pipeline: training waits for it 37% of the time"),
        ((5000, 2400, 1900, 1850), True, "both share the machine: the pipeline's work costs the model 21%"),
        ((9000, 1000, 900, 890), False, "the model, with 90% of the cores' time"),
        ((1000, 800, 500, 440), False, "both share the cores, 44% of their time for the pipeline"),
        ((250, 1000, 500, 200), False, "the pipeline, with 80% of the cores' time"),
    ],
)
def test_one_sentence_says_what_limits_the_machine(rates: tuple[float, ...], on_gpu: bool, says: str) -> None:
    named = dict(zip(("data", "model", "interference", "end-to-end"), rates, strict=True))
    sentence = bottleneck(named, None if on_gpu else named)
    assert sentence.startswith(says), sentence

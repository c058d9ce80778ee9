"""The page's first sentence: what MRR and its control say, and what they cannot say."""

from __future__ import annotations

from typing import Any

import pytest

from iwm.report.verdict import verdict

CHANCE = 0.0239


def _result(mrr: float, control: float, error: float | None = 0.005, held_out: bool = True) -> dict[str, Any]:
    def part(mean: float) -> dict[str, Any]:
        return {"pooled": {"teacher": {"mean": mean, "standard_error": error}}}

    data = {"shards": "photos", "split": "val", "held_out": held_out}
    return {"chance": CHANCE, "mrr": part(mrr), "shuffled_actions": part(control), "data": data}


@pytest.mark.parametrize(
    ("mrr", "control", "error", "kind", "words"),
    [
        (0.388, 0.022, 0.005, "good", ("finds the right view: MRR 0.388", "16 times", "falls to chance (0.022)")),
        # Three standard errors above chance, and a tenth of the gain: with 64,000 images any control is.
        (0.388, 0.026, 0.0001, "good", ("falls to near chance (0.026)",)),
        (0.388, 0.200, 0.005, "doubtful", ("still 0.200", "48% of the gain does not need the action")),
        (0.388, 0.380, 0.005, "bad", ("as high", "the action makes no difference")),
        (0.026, 0.024, 0.005, "bad", ("does not find the right view", "not above chance (0.024)")),
        (0.010, 0.024, 0.001, "bad", ("not above chance",)),
        (0.388, 0.022, None, "unknown", ("no finite standard error",)),
    ],
)
def test_the_verdict_follows_from_mrr_its_control_and_their_errors(
    mrr: float, control: float, error: float | None, kind: str, words: tuple[str, ...]
) -> None:
    found = verdict(_result(mrr, control, error), "feature")
    assert found.kind == kind
    for part in words:
        assert part in found.text


def test_a_mean_must_lie_three_errors_above_chance() -> None:
    assert verdict(_result(CHANCE + 0.0149, CHANCE), "feature").kind == "bad"
    assert verdict(_result(CHANCE + 0.0151, CHANCE), "feature").kind == "good"


def test_training_images_and_a_predictor_without_actions_are_named() -> None:
    trained = verdict(_result(0.388, 0.022, held_out=False), "feature")
    assert (trained.kind, "training images" in trained.text) == ("doubtful", True)
    unconditioned = verdict(_result(CHANCE, CHANCE), "none")
    assert (unconditioned.kind, "by construction" in unconditioned.text) == ("unknown", True)


def test_a_run_without_evaluation_names_the_command() -> None:
    assert "iwm evaluate world-model --checkpoint RUN" in verdict(None, "feature").text

"""The pipeline's time by stage: the cuts are the real pipeline's, and every stage is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pipeline_stages import colour_cuts, stage_times

from dali_pipelines.augmentation import SCENARIOS, Photometric, Views

JITTER = ["target: brightness, contrast", "target: saturation, hue"]
JITTER += [name.replace("target", "source") for name in JITTER]


@pytest.mark.parametrize(
    ("views", "stages"),
    [
        (Views(), [*JITTER, "source: grayscale", "source: blur", "source: solarize"]),
        (SCENARIOS["jitter"], JITTER),
        (SCENARIOS["destructive"], ["source: grayscale", "source: blur", "source: solarize"]),
        (SCENARIOS["ijepa"], []),
    ],
)
def test_the_last_cut_is_the_whole_pipeline_and_only_what_can_happen_is_a_stage(
    views: Views, stages: list[str]
) -> None:
    cuts = colour_cuts(views)
    assert [name for name, _ in cuts] == ["parameters", *stages]
    last = cuts[-1][1]
    assert probabilities(last.target) == probabilities(views.target)
    assert probabilities(last.source) == probabilities(views.source)


def probabilities(spec: Photometric) -> list[float]:
    return [spec.jitter_probability, spec.grayscale_probability, spec.blur_probability, spec.solarize_probability]


def test_every_stage_is_measured_in_a_process_of_its_own(tiny_shards: Path) -> None:
    views = replace(SCENARIOS["jitter"], size=48)
    times = stage_times(tiny_shards, "train", views, device="cpu", threads=1, batch=16, seconds=0.2)
    assert list(times) == ["read", "decode", "crop and resize", "parameters", *JITTER]
    assert all(time["p10"] <= time["median"] <= time["p90"] for time in times.values())
    assert times["decode"]["median"] > 0

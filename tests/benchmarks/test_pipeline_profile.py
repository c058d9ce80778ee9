"""Pipeline profile: the cuts equal the real pipeline, and every stage is measured."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pipeline_profile
import pytest
from pipeline_profile import _seconds, _stage_times, colour_cuts

from dali_pipelines.augmentations import PARAMS, PhotometricConfig
from dali_pipelines.outputs import run_pipeline
from dali_pipelines.reader import open_source
from dali_pipelines.views import SCENARIOS, Views

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


def probabilities(spec: PhotometricConfig) -> list[float]:
    return [spec.jitter_probability, spec.grayscale_probability, spec.blur_probability, spec.solarize_probability]


def test_every_stage_is_measured_in_every_turn(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pipeline_profile.TURNS, "cpu", 2)
    seen: list[Sequence[float]] = []
    monkeypatch.setattr(pipeline_profile, "percentiles", lambda turns: seen.append(turns) or {"median": turns[0]})
    views, cores = replace(SCENARIOS["jitter"], size=48), sorted(os.sched_getaffinity(0))
    times = _stage_times(tiny_shards, "train", views, "cpu", cores, batch=16, seconds=0.2)
    assert list(times) == ["read", "decode", "crop and resize", "parameters", *JITTER]
    assert [len(turns) for turns in seen] == [2] * len(times)


def test_a_pipeline_is_freed_once_it_is_measured() -> None:
    built: list[weakref.ref[Counted]] = []
    runs: list[int] = []

    class Counted:
        def __init__(self) -> None:
            built.append(weakref.ref(self))

        def run(self) -> None:
            runs.append(len(built))

    for _ in range(2):
        _seconds(Counted, 3, on_gpu=False)
    assert runs == [1] * 4 + [2] * 4, "one batch before it is measured"
    assert [pipeline() for pipeline in built] == [None, None]


def test_with_triton_the_graph_ends_with_the_parameters(tiny_shards: Path) -> None:
    source = open_source(tiny_shards, "train", label=None, rank=0, world_size=1)
    settings = {"batch_size": 4, "num_threads": 1, "device_id": None, "seed": 0, "prefetch_queue_depth": 1}
    built = dict(pipeline_profile.cuts(source, replace(Views(), size=48), "triton", settings))
    assert list(built) == ["read", "decode", "crop and resize", "parameters"]
    params, crops, _ = run_pipeline(built["parameters"](), tiny_shards)
    assert params.shape[1] == len(PARAMS)
    assert crops.shape == (4, 48, 48, 3)

"""Operators of the GPU's graphs, and their kernel launches: none of them grows with the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from environment import BenchmarkError
from pipeline_operators import GpuOperator, count, launches, read_graph, two_views_graph

from dali_pipelines.dali import fn, pipeline_def, types
from dali_pipelines.views import SCENARIOS, Views


def test_the_default_graph_launches_fifteen_kernels_for_a_batch() -> None:
    counted = count(Views(), "gpu", 256)
    assert counted["operators"] == {
        "decoders__Image": 0,
        "Slice": 3,
        "Resize": 2,
        "CoordTransform": 4,
        "reductions__Mean": 1,
        "BrightnessContrast": 2,
        "GaussianBlur": 2,
        "LookupTable": 1,
        "_conditional__Split": 0,
        "_conditional__Merge": 0,
    }
    assert (counted["dali"], counted["triton"]) == (15, 0)
    # Params to the GPU, and the mean grey back.
    assert (counted["copies_to_gpu"], counted["copies_to_cpu"]) == (1, 1)


@pytest.mark.parametrize("jitter_impl", ["linear", "torchvision"])
def test_with_triton_dali_only_crops_and_resizes_and_copies_nothing_back(jitter_impl: str) -> None:
    counted = count(replace(Views(), jitter_impl=jitter_impl), "triton", 256)
    assert counted["operators"] == {"decoders__Image": 0, "Slice": 1, "Resize": 2}
    assert (counted["triton"], counted["copies_to_gpu"], counted["copies_to_cpu"]) == (4, 1, 0)


def test_the_cpus_views_are_copied_and_nothing_runs_on_the_gpu() -> None:
    assert count(Views(), "cpu", 256) == {
        "operators": {}, "dali": 0, "triton": 0, "copies_to_gpu": 3, "copies_to_cpu": 0
    }  # fmt: skip


@pytest.mark.parametrize("jitter_impl", ["linear", "torchvision"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_operator_launches_a_kernel_for_each_image(scenario: str, jitter_impl: str) -> None:
    views = replace(SCENARIOS[scenario], jitter_impl=jitter_impl)
    few, many = (count(views, "gpu", batch)["operators"] for batch in (8, 256))
    assert few == many


def test_operators_of_each_image_and_of_small_minibatches_are_counted_as_such() -> None:
    @pipeline_def
    def pipeline() -> object:
        jpeg, _ = fn.readers.file(files=["unused"], labels=[0])
        image = fn.resize(fn.decoders.image(jpeg, device="mixed"), size=[8, 8])
        return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)

    graph = read_graph(pipeline(batch_size=256, num_threads=1, device_id=0))
    assert {op.name: launches(op, 256, 64) for op in graph.operators} == {
        "decoders__Image": 0, "Resize": 16, "ColorSpaceConversion": 256
    }  # fmt: skip


def test_an_operator_of_unknown_launches_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="operator Warp: its kernel launches are not known"):
        launches(GpuOperator("Warp", {}), 1, 1)


def test_the_graph_needs_neither_shards_nor_a_gpu() -> None:
    assert read_graph(two_views_graph(Views(), "gpu", 4)).operators

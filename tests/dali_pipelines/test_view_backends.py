"""Backends of the two views: equal draws, memory of their outputs, and states that are not exchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from dali_pipelines.augmentations import NO_PHOTOMETRIC, ViewBackend
from dali_pipelines.decoder import DECODER, Decoder
from dali_pipelines.loader import LoaderStateError, ViewLoader
from dali_pipelines.outputs import run_pipeline
from dali_pipelines.pipelines import two_views
from dali_pipelines.reader import open_source
from dali_pipelines.views import SCENARIOS, Views

RANDOM = {"CoinFlip", "RandomCropGenerator", "random__CoinFlip", "random__Uniform", "readers__Webdataset"}


def graph(shards: Path, views: Views, backend: ViewBackend, device_id: int | None, decoder: Decoder = DECODER) -> Any:
    """Return a pipeline whose graph is complete but not built, so that a GPU's needs no GPU."""
    source = open_source(shards, "train", label=None, rank=0, world_size=1)
    pipeline = two_views(
        source, views, backend=backend, device_id=device_id, batch_size=4, num_threads=1, seed=0, shuffle_buffer=16,
        shuffle_seed=0, reader_prefetch=1, decoder=decoder, prefetch_queue_depth=1,
    )  # fmt: skip
    pipeline._build_graph()
    return pipeline


def random_operators(pipeline: Any) -> list[str]:
    """Return the operators that DALI seeds, in the order in which it seeds them."""
    return [op._op.schema_name for op in pipeline._ops if op._op.schema_name in RANDOM]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_backend_draws_in_the_same_order(shards: Path, scenario: str) -> None:
    views = SCENARIOS[scenario]
    expected = random_operators(graph(shards, views, "cpu", None))
    assert len(expected) > 2
    for backend, device_id in (("cpu", 0), ("gpu", 0), ("triton", 0), ("triton", None)):
        assert random_operators(graph(shards, views, backend, device_id)) == expected, backend
        assert random_operators(graph(shards, views, backend, device_id, Decoder("cpu"))) == expected, backend


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_crop_of_triton_has_the_params_and_the_pixels_that_the_cpus_views_have(shards: Path, scenario: str) -> None:
    views = replace(SCENARIOS[scenario], size=24)
    params, crops, source_info = run_pipeline(graph(shards, views, "triton", None), shards)
    expected_params, *_, expected_info = run_pipeline(graph(shards, views, "cpu", None), shards)
    assert torch.equal(params, expected_params)
    assert torch.equal(source_info, expected_info)
    still = replace(views, source=NO_PHOTOMETRIC, target=NO_PHOTOMETRIC)
    assert torch.equal(crops, run_pipeline(graph(shards, still, "cpu", None), shards)[1])


def test_the_cpu_backend_beside_a_gpu_computes_nothing_there_and_copies_three_contiguous_outputs(shards: Path) -> None:
    pipeline = graph(shards, Views(), "cpu", 0)
    devices = {op.spec.OutputDevice(i) for op in pipeline._ops for i in range(op.spec.NumOutput())}
    assert devices == {"cpu"}
    params, source, target, source_info = pipeline._graph_outputs
    assert [output.device for output in (params, source, target, source_info)] == ["gpu", "gpu", "gpu", "cpu"]
    # A batch merged from branches lies in pieces; a copy puts it together.
    assert [output.source._op.schema_name for output in (source, target)] == ["Copy", "Copy"]


@pytest.mark.parametrize("backend", ["gpu", "triton"])
def test_cpu_cores_decode_and_crop_for_a_gpu_that_does_the_rest(shards: Path, backend: ViewBackend) -> None:
    def devices(decoder: Decoder) -> dict[str, str]:
        pipeline = graph(shards, Views(), backend, 0, decoder)
        return {op._op.schema_name: op.spec.OutputDevice(0) for op in pipeline._ops}

    cpu, gpu = devices(Decoder("cpu")), devices(Decoder("gpu"))
    assert (cpu["decoders__ImageSlice"], cpu["Resize"]) == ("cpu", "gpu")
    assert (gpu["decoders__Image"], gpu["Slice"], gpu["Resize"]) == ("gpu", "gpu", "gpu")
    assert "decoders__Image" not in cpu


def test_views_made_on_a_gpu_are_put_together_by_one_kernel_each(shards: Path) -> None:
    _, source, target, _ = graph(shards, Views(), "gpu", 0)._graph_outputs
    # A copy of a batch that was merged from branches is a copy for each image.
    assert [output.source._op.schema_name for output in (source, target)] == ["Slice", "Slice"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable GPU here")
def test_every_backend_and_decoder_makes_a_gpus_views_but_for_rounding(shards: Path) -> None:
    def batch(backend: ViewBackend, decoder: Decoder) -> list[torch.Tensor]:
        loader = ViewLoader(
            shards, "train", Views(size=32), batch_size=16, seed=3, device="cuda", backend=backend, decoder=decoder
        )
        return [tensor.float().cpu() for tensor in next(loader)[:3]]

    expected = batch("cpu", DECODER)
    for backend in get_args(ViewBackend):
        for decoder in (Decoder("cpu"), Decoder("gpu")):
            made = batch(backend, decoder)
            assert torch.equal(made[2], expected[2])
            assert all((one - other).abs().mean() < 1 for one, other in zip(made[:2], expected[:2], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no usable GPU here")
def test_beside_a_gpu_the_cpu_backend_makes_the_views_of_a_cpu_and_the_gpus_params(shards: Path) -> None:
    def batch(device: str, backend: ViewBackend) -> list[torch.Tensor]:
        loader = ViewLoader(
            shards, "train", Views(size=32), batch_size=47, seed=3, device=device, backend=backend, num_threads=1
        )
        made = next(loader)
        assert made.source.device.type == made.target.device.type == made.params.device.type == device
        return [tensor.cpu() for tensor in made[:3]]

    here, there, gpu = batch("cpu", "cpu"), batch("cuda", "cpu"), batch("cuda", "gpu")
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))
    assert torch.equal(here[2], gpu[2])


def test_a_state_of_another_backend_is_refused_by_name(shards: Path) -> None:
    def loader(**options: Any) -> ViewLoader:
        return ViewLoader(shards, "train", Views(size=32), batch_size=8, seed=5, num_threads=1, **options)

    state = loader().state_dict()
    assert state["backend"] == "cpu"
    for name in ("backend", "decoder"):
        with pytest.raises(LoaderStateError, match=f"{name} was 'gpu', is 'cpu'") as caught:
            loader(state={**state, name: "gpu"})
        assert caught.value.different == {name}
    older = {name: value for name, value in state.items() if name != "decoder"}
    loader(state=older)
    with pytest.raises(LoaderStateError, match="decoder was None, is 'cpu'"):
        loader(state={**older, "device": "gpu"})

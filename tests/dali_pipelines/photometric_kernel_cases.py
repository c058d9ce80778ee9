"""Photometric kernels, interpreted on a CPU, against the torch replay; the loader with backend `triton`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import DEVICE

# isort: split
import parity
from parity import ParityOptions

from dali_pipelines import photometric_kernels, photometric_triton, replay
from dali_pipelines.augmentations import (
    NO_PHOTOMETRIC,
    PARAMS,
    SINGLE_OP,
    SOURCE,
    TARGET,
    JitterImpl,
    PhotometricConfig,
)
from dali_pipelines.loader import ViewLoader
from dali_pipelines.photometric_kernels import KERNEL_OPS, apply_views, kernel_launches, missing_ops
from dali_pipelines.views import SCENARIOS, Views

IMPLEMENTATIONS = get_args(JitterImpl)
ALWAYS = PhotometricConfig(1.0, 0.5, 0.5, 0.4, 0.2, 0.5, 0.7, (0.1, 2.0), 0.5)


def drawn(views: Views, count: int, seed: int = 0) -> Tensor:
    """Return params as the pipeline samples them for these views; the geometry is 0."""
    generator = torch.Generator().manual_seed(seed)
    params = torch.zeros(count, len(PARAMS))
    for columns, spec in ((TARGET, views.target), (SOURCE, views.source)):
        params[:, columns] = replay.sample_photometric(spec, count, generator)
    return params.to(DEVICE)


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator).to(DEVICE)


def both(crops: Tensor, params: Tensor, views: Views) -> list[tuple[Tensor, Tensor]]:
    """Return the kernels' and the replay's view, for source and target. The replay runs on a CPU, in float32."""
    made = (view.cpu() for view in apply_views(crops, params, views))
    crops, params = crops.cpu(), params.cpu()
    again = (replay.apply_photometric(crops, params[:, columns], views.jitter_impl) for columns in (SOURCE, TARGET))
    return list(zip(made, again, strict=True))


def assert_equal_but_for_ties(crops: Tensor, params: Tensor, views: Views) -> None:
    """Assert that views differ from the replay by one grey level at most, and only where rounding meets a tie."""
    for made, again in both(crops, params, views):
        apart = (made.int() - again.int()).abs()
        assert (made.dtype, made.shape) == (torch.uint8, crops.shape)
        assert apart.max() <= 1
        assert (apart > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("jitter_impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", [op for op in KERNEL_OPS if op != "blur"])
def test_every_op_is_the_replays(op: str, jitter_impl: JitterImpl) -> None:
    views = Views(source=SINGLE_OP[op], target=SINGLE_OP[op], jitter_impl=jitter_impl)
    crops, params = noise(4, 19, 23), drawn(views, 4)
    assert_equal_but_for_ties(crops, params, views)
    assert all((made != crops).float().mean() > 0.2 for made in apply_views(crops, params, views))


def test_blur_is_the_replays_with_the_taps_of_the_largest_possible_sigma() -> None:
    views = Views(source=SINGLE_OP["blur"], target=NO_PHOTOMETRIC)
    crops, params = noise(4, 19, 23), drawn(views, 4)
    sigma = PARAMS.index("source_blur_sigma")
    params[0, sigma] = views.source.blur_sigma[1]  # the replay's number of taps follows the batch's largest
    assert_equal_but_for_ties(crops, params, views)
    params[:, sigma] = torch.tensor([0.3, 0.7, 1.1, 1.3])
    for made, again in both(crops, params, views):
        assert (made.float() - again.float()).abs().mean() <= 0.1


@pytest.mark.parametrize("jitter_impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("scenario", [name for name, views in SCENARIOS.items() if not missing_ops(views)])
def test_the_whole_chain_is_the_replays(scenario: str, jitter_impl: JitterImpl) -> None:
    views = replace(SCENARIOS[scenario], jitter_impl=jitter_impl)
    params = drawn(views, 6)
    if views.source.blur_probability > 0:
        params[0, PARAMS.index("source_blur_sigma")] = views.source.blur_sigma[1]
    assert_equal_but_for_ties(noise(6, 16, 17), params, views)


@pytest.mark.parametrize("jitter_impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 90), (2, 29, 14), (2, 16, 32)])
def test_both_views_with_all_ops_at_any_size_and_batch(
    shape: tuple[int, ...], jitter_impl: JitterImpl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are so small that images have several, whole and partial ones. One image has a pixel only."""
    monkeypatch.setattr(photometric_kernels, "SUMMED_PIXELS", 128)
    monkeypatch.setattr(photometric_kernels, "PIXELS", 256)
    views = Views(source=ALWAYS, target=replace(ALWAYS, blur_probability=0.0), jitter_impl=jitter_impl)
    params = drawn(views, shape[0])
    params[:, PARAMS.index("source_blur_sigma")] = 0.0  # the replay cannot mirror beyond an image
    assert_equal_but_for_ties(noise(*shape), params, views)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (5, 4), (13, 12)])
def test_blur_mirrors_the_borders_also_of_images_smaller_than_its_reach(shape: tuple[int, int]) -> None:
    views = Views(source=SINGLE_OP["blur"], target=SINGLE_OP["blur"])
    crops, params = noise(1, *shape), drawn(views, 1)
    made = apply_views(crops, params, views)[0]
    sigma = params[0, PARAMS.index("source_blur_sigma")].item()
    weights = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
    expected = crops[0].cpu().numpy().astype(np.float64)
    for axis in (1, 0):
        widths = [(6, 6) if a == axis else (0, 0) for a in range(3)]
        padded = np.lib.stride_tricks.sliding_window_view(np.pad(expected, widths, mode="reflect"), 13, axis)
        expected = (padded @ (weights / weights.sum())).round()
    assert np.abs(made[0].cpu().numpy() - expected).max() <= 1
    assert (made[0].cpu().numpy() != expected).mean() <= 1e-3


@pytest.mark.parametrize("jitter_impl", IMPLEMENTATIONS)
def test_params_that_change_nothing_leave_every_byte(jitter_impl: JitterImpl) -> None:
    views = Views(source=ALWAYS, target=ALWAYS, jitter_impl=jitter_impl)
    crops, params = noise(2, 20, 21), drawn(Views(source=NO_PHOTOMETRIC, target=NO_PHOTOMETRIC), 2)
    assert all(torch.equal(made, crops) for made in apply_views(crops, params, views))


def test_launches_are_counted_and_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(photometric_triton, name)

        def __getitem__(self, grid: tuple[int, int]) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("grey_sums_kernel", "views_kernel", "blur_kernel"):
        monkeypatch.setattr(photometric_triton, name, Counted(name))
    for views, count in (
        (SCENARIOS["default"], 4),
        (SCENARIOS["jitter"], 2),
        (SCENARIOS["destructive"], 3),
        (SCENARIOS["ijepa"], 1),
        (Views(source=ALWAYS, target=ALWAYS), 6),
    ):
        for batch in (1, 3):
            launched.clear()
            apply_views(noise(batch, 8, 8), drawn(views, batch), views)
            assert len(launched) == kernel_launches(views) == count


@pytest.mark.parametrize("jitter_impl", IMPLEMENTATIONS)
def test_the_loader_makes_dalis_views(shards: Path, jitter_impl: JitterImpl) -> None:
    views = Views(size=24, source=ALWAYS, jitter_impl=jitter_impl)
    options: dict[str, Any] = {"batch_size": 4, "seed": 3, "device": DEVICE, "label": "row", "num_threads": 1}
    triton, cpu = (next(ViewLoader(shards, "train", views, backend=name, **options)) for name in ("triton", "cpu"))
    assert torch.equal(triton.params, cpu.params)
    assert list(triton.keys) == list(cpu.keys)
    assert triton.label is not None
    assert torch.equal(triton.label, cpu.label)
    for made, expected in ((triton.source, cpu.source), (triton.target, cpu.target)):
        assert (made.float() - expected.float()).abs().mean() <= (0.1 if DEVICE == "cpu" else 1.0)


def test_a_restored_loader_goes_on_bit_for_bit(shards: Path) -> None:
    def loader(**state: Any) -> ViewLoader:
        views = Views(size=16)
        return ViewLoader(shards, "train", views, batch_size=4, seed=5, device=DEVICE, backend="triton", **state)

    whole = loader()
    next(whole)
    restored = loader(state=whole.state_dict())
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(next(whole)[:3], next(restored)[:3], strict=True))


def test_the_parity_benchmark_compares_the_kernels_with_the_replay(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "SINGLE_OP", {name: SINGLE_OP[name] for name in ("hue", "blur")})
    rows = parity.measured(ParityOptions(DEVICE, images=2, size=16), shards, triton=True)
    assert len(rows) == 2 * (2 + 2)
    assert all(row["triton"]["mean"] <= 0.1 for row in rows)

"""Distributions of the sampled parameters, against their declaration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_shards import jpeg, write_split
from scipy.stats import binomtest, ks_2samp, kstest
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from dali_pipelines.augmentations import (
    GEOMETRY_FIELDS,
    IDENTITY,
    JITTER_FIELDS,
    JITTER_OPS,
    NO_PHOTOMETRIC,
    PARAMS,
    PHOTOMETRIC_FIELDS,
    SOURCE,
    TARGET,
    PhotometricConfig,
)
from dali_pipelines.loader import ViewLoader
from dali_pipelines.replay import sample_photometric
from dali_pipelines.views import SCENARIOS, Views

DRAWS = 4000
UNLIKELY = 1e-4
"""P-value below which a distribution counts as wrong. Seeds are fixed, so the tests are deterministic."""


@pytest.fixture(scope="module")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 20 images of 75×100 pixels; the parameters do not depend on their content."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    write_split(folder, "train", [jpeg(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8))] * 20, per_shard=(20,))
    return folder


def draw(folder: Path, views: Views, draws: int = DRAWS) -> Tensor:
    loader = ViewLoader(folder, "train", replace(views, size=8), batch_size=500, seed=1, num_threads=1)
    return torch.cat([next(loader).params.clone() for _ in range(draws // 500)])


def replayed(spec: PhotometricConfig) -> Tensor:
    return sample_photometric(spec, DRAWS, torch.Generator().manual_seed(1))


def assert_drawn_as_declared(params: Tensor, spec: PhotometricConfig) -> None:
    """Check `params` [n, p], in the order of PHOTOMETRIC_FIELDS, against the distributions of `spec`."""
    columns = dict(zip(PHOTOMETRIC_FIELDS, params.double().numpy().T, strict=True))
    identities = dict(zip(PHOTOMETRIC_FIELDS, IDENTITY, strict=True))
    jittered = np.any([columns[name] != identities[name] for name in JITTER_FIELDS], axis=0)
    assert_probability(jittered, spec.jitter_probability)
    for op in JITTER_OPS if jittered.any() else ():
        if op.in_paper or spec.applies(op):
            assert_uniform(columns[op.name][jittered], *spec.value_range(op))
        else:
            assert (columns[op.name] == op.identity).all()
    for name in ("grayscale", "solarize"):
        assert set(columns[name]) <= {0.0, 1.0}
        assert_probability(columns[name] == 1, getattr(spec, f"{name}_probability"))
    blurred = columns["blur_sigma"] > 0
    assert_probability(blurred, spec.blur_probability)
    if blurred.any():
        assert_uniform(columns["blur_sigma"][blurred], *spec.blur_sigma)


def assert_probability(happened: np.ndarray, probability: float) -> None:
    assert binomtest(int(happened.sum()), len(happened), probability).pvalue > UNLIKELY


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert low - 1e-6 <= values.min()
    assert values.max() <= high + 1e-6
    assert kstest(values, "uniform", (low, high - low)).pvalue > UNLIKELY


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_draws_its_ranges_and_probabilities(tiny_shards: Path, scenario: str) -> None:
    views = SCENARIOS[scenario]
    params = draw(tiny_shards, views)
    assert params.shape == (DRAWS, len(PARAMS))
    assert_drawn_as_declared(params[:, TARGET], views.target)
    assert_drawn_as_declared(params[:, SOURCE], views.source)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_replay_draws_the_same_distributions(scenario: str) -> None:
    assert_drawn_as_declared(replayed(SCENARIOS[scenario].source), SCENARIOS[scenario].source)


def test_source_and_target_jitter_are_independent(tiny_shards: Path) -> None:
    params = draw(tiny_shards, SCENARIOS["jitter"]).double()
    both = torch.cat([params[:, TARGET][:, :4], params[:, SOURCE][:, :4]], dim=1)
    correlation = torch.corrcoef(both.T)
    # The shared coin does not correlate the factors of a view; the views must be independent.
    assert (correlation - torch.eye(8, dtype=torch.float64)).abs().max() < 0.08


def test_what_cannot_vary_is_written_as_it_is(tiny_shards: Path) -> None:
    still = PhotometricConfig(1.0, 0.4, 0.0, 0.0, 0.0, 0.0, 1.0, (1.5, 1.5), 0.0)
    params = draw(tiny_shards, Views(source=still, target=NO_PHOTOMETRIC), draws=500)[:, SOURCE]
    written = torch.tensor(IDENTITY).where(torch.tensor([name != "blur_sigma" for name in PHOTOMETRIC_FIELDS]), 1.5)
    assert torch.equal(params[:, 1:], written[1:].expand(500, -1))
    assert params[:, 0].std() > 0.1


def test_crop_boxes_have_the_distribution_of_torchvisions_random_resized_crop(tiny_shards: Path) -> None:
    params = draw(tiny_shards, Views(target=NO_PHOTOMETRIC, source=NO_PHOTOMETRIC))
    x, y, width, height, image_width, image_height, flip = params.double().numpy()[:, : len(GEOMETRY_FIELDS)].T
    assert set(image_width) == {100.0}
    assert set(image_height) == {75.0}
    assert_probability(flip == 1, 0.5)
    torch.manual_seed(0)
    image = torch.empty(3, 75, 100)
    boxes = [RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)]
    top, left, tall, wide = np.array(boxes, dtype=float).T
    pairs = ((x, left), (y, top), (width, wide), (height, tall))
    pairs += ((width * height, wide * tall), (width / height, wide / tall), (x + width, left + wide))
    for ours, torchvisions in pairs:
        assert ks_2samp(ours, torchvisions).pvalue > UNLIKELY


def test_a_panorama_that_no_box_fits_is_cut_to_the_nearest_aspect(tmp_path: Path) -> None:
    """Check the fallback of the crop: torchvision's size, but at a random position; torchvision uses the centre."""
    write_split(tmp_path, "train", [jpeg(np.zeros((40, 400, 3), dtype=np.uint8))] * 4, per_shard=(4,))
    x, y, width, height = draw(tmp_path, Views(target=NO_PHOTOMETRIC, source=NO_PHOTOMETRIC), draws=500)[:, :4].T
    assert set(width.tolist()) == {53.0}
    assert set(height.tolist()) == {40.0}
    assert set(y.tolist()) == {0.0}
    assert x.min() < 40
    assert x.max() > 300


def test_the_whole_image_can_be_asked_for(tiny_shards: Path) -> None:
    views = Views(crop_scale=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3), flip_probability=0.0, target=NO_PHOTOMETRIC)
    assert set(map(tuple, draw(tiny_shards, views, draws=500)[:, :7].tolist())) == {(0, 0, 100, 75, 100, 75, 0)}


def test_ops_that_the_paper_lacks_change_no_number_of_its_views(tiny_shards: Path) -> None:
    """Numbers are those of the program before these ops existed."""
    generator = torch.Generator().manual_seed(0)
    sampled = sample_photometric(PhotometricConfig(), 3, generator)[0].tolist()
    first = dict(zip(PHOTOMETRIC_FIELDS, sampled, strict=True))
    assert first["brightness"] == pytest.approx(0.7056244015693665, abs=0)
    assert first["blur_sigma"] == pytest.approx(1.838868498802185, abs=0)
    assert torch.rand(1, generator=generator).item() == pytest.approx(0.0362, abs=5e-5)
    loader = ViewLoader(tiny_shards, "train", Views(size=8), batch_size=4, seed=1, num_threads=1)
    row = dict(zip(PARAMS, next(loader).params[3].tolist(), strict=True))
    assert (row["crop_x"], row["flip"], row["target_brightness"]) == (19, 1, 0.7950451970100403)
    assert (row["source_brightness"], row["source_hue"]) == (1.3980774879455566, -0.011263269931077957)

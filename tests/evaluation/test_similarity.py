"""The similarity figures are what they are said to be, and tell invariant features from those that keep colours."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dali_pipelines.augmentations import PhotometricConfig
from dali_pipelines.replay import sample_photometric
from dali_pipelines.views import SCENARIOS, Views
from iwm.config import Config, ConfigError
from iwm.evaluation.settings import SimilaritySettings
from iwm.evaluation.similarity import embed_views, similarities, variance_ratio, view_augmentation
from iwm.models.world_model import WorldModel
from iwm.protocols import evaluate
from iwm.training.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def features() -> Tensor:
    """Of 5 images, 4 views each."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(5, 1, 6, generator=generator) + torch.randn(5, 4, 6, generator=generator) + 1


def test_similarities_are_the_means_of_the_matrix(features: Tensor) -> None:
    unit = features.double() / features.double().norm(dim=2, keepdim=True)
    matrix = torch.einsum("iad,jbd->iajb", unit, unit)
    within, between = similarities(features)
    for i in range(5):
        own = matrix[i, :, i]
        assert within[i].item() == pytest.approx(((own.sum() - own.trace()) / 12).item())
        others = torch.cat([matrix[i, :, j].flatten() for j in range(5) if j != i])
        assert between[i].item() == pytest.approx(others.mean().item())


def test_the_variance_ratio_is_that_of_the_covariances_traces(features: Tensor) -> None:
    within = torch.stack([torch.cov(image.T.double()) for image in features]).mean(0).trace()
    between = torch.cov(features.double().mean(1).T).trace()
    assert variance_ratio(features)[0] == pytest.approx((within / between).item())


def test_its_error_is_the_jackknifes(features: Tensor) -> None:
    without = [variance_ratio(torch.cat([features[:i], features[i + 1 :]]))[0] for i in range(5)]
    mean = sum(without) / 5
    jackknife = math.sqrt(4 / 5 * sum((value - mean) ** 2 for value in without))
    assert variance_ratio(features)[1] == pytest.approx(jackknife)


def test_the_ratio_does_not_depend_on_where_features_lie_and_how_large_they_are(features: Tensor) -> None:
    assert variance_ratio(7 * features + 30)[0] == pytest.approx(variance_ratio(features)[0], rel=1e-4)


class Patterns(WorldModel):
    """Features that no jitter changes: which pixels are brighter than the image's middle."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # without encoders: the features are computed from the pixels
        self.config = Config(views=Views(size=8))

    def encode(self, images: Tensor, which: str) -> Tensor:
        grey = images.float().mean(3).flatten(1)
        middle = (grey.amax(1, keepdim=True) + grey.amin(1, keepdim=True)) / 2
        return (grey > middle).float().unflatten(1, (4, 16))


class Pixels(Patterns):
    """Features that keep all that an augmentation does."""

    def encode(self, images: Tensor, which: str) -> Tensor:
        return images.float().flatten(1).unflatten(1, (4, 48))


def test_invariant_features_have_ratio_zero_and_pixels_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(6, 8, 8, 1, generator=generator) > 0.5
    images = torch.where(patterns, 160, 80).expand(-1, -1, -1, 3).to(torch.uint8)
    jitter = PhotometricConfig(1.0, 0.4, 0.3, 0.2, 0.1).without_destructive()
    params = torch.stack([sample_photometric(jitter, 7, generator) for _ in images])
    invariant = embed_views(Patterns(), images, params, "teacher")
    within, between = similarities(invariant)
    assert within.tolist() == pytest.approx([1.0] * 6)
    assert (between < 0.99).all()
    assert variance_ratio(invariant)[0] == 0
    kept = embed_views(Pixels(), images, params, "teacher", batch_size=5)
    assert variance_ratio(kept)[0] > 0.5
    whole = embed_views(Pixels(), images, params, "teacher")
    assert torch.equal(kept, whole)


def test_views_are_augmented_as_the_source_is_with_jitter_always() -> None:
    strong = view_augmentation(SCENARIOS["strong"])
    assert strong == replace(SCENARIOS["strong"].source, jitter_probability=1.0)
    assert view_augmentation(SCENARIOS["ijepa"]) == view_augmentation(SCENARIOS["strong"], "default") != strong
    with pytest.raises(ConfigError, match=r"--scenario.*ijepa.*strong_jitter"):
        view_augmentation(SCENARIOS["strong"], "ijepa")


def test_the_protocol_writes_scores_and_figure_and_the_page_shows_them(run: Path) -> None:
    result = evaluate(
        "similarity", SimilaritySettings(checkpoint=run, num_images=6, num_views=4, num_shown=3, encoder="student")
    )
    assert result == json.loads((run / "eval" / "similarity.json").read_text()) | {"settings": result["settings"]}
    assert -1 <= result["between_images"]["mean"] < result["within_image"]["mean"] <= 1
    assert result["variance_ratio"]["mean"] > 0
    matrix = result["figures"][0]["matrix"]
    assert [label["name"] for label in matrix["labels"]] == result["shown"]
    with zipfile.ZipFile(run / "eval" / "similarity.zip") as archive:
        # 3 images of 4 views, and a line between images.
        assert Image.open(archive.open(matrix["tile"]["image"])).size == (14, 14)
    page = (run / "report.html").read_text()
    assert "Similarity of augmented views" in page
    assert f"{result['variance_ratio']['mean']:.4f}" in page


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_images": 1}, "--num-images.*at least 2"),
        ({"num_images": 4, "num_shown": 2, "scenario": "nonsense"}, "--scenario: 'nonsense'"),
    ],
)
def test_settings_that_cannot_be_are_named(run: Path, settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        evaluate("similarity", SimilaritySettings(checkpoint=run, **settings))


def test_a_collapsed_model_is_an_error_that_says_so(run: Path) -> None:
    file = next((run / "checkpoints").iterdir())
    content = torch.load(file, weights_only=True)
    content["model"]["target_encoder.norm.weight"].zero_()
    content["model"]["target_encoder.norm.bias"].fill_(1.0)
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="collapsed"):
        evaluate("similarity", SimilaritySettings(checkpoint=run, num_images=4, num_views=2, num_shown=2))

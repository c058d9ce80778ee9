"""A prediction re-enters the predictor with mean and deviation of its token in the source's features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dali_pipelines.replay import apply_photometric, sample_photometric
from dali_pipelines.views import Views
from iwm.config import Config
from iwm.evaluation.reentry import predict_in_a_row, reenter
from iwm.evaluation.settings import bank_augmentation
from iwm.model_config import EncoderConfig, LossConfig, PredictorConfig
from iwm.models.world_model import WorldModel

CONFIG = Config(
    views=Views(size=16),
    encoder=EncoderConfig(embed_dim=48, depth=2, num_heads=2, patch_size=4),
    predictor=PredictorConfig(embed_dim=48, depth=1, num_heads=2),
)


def _model(config: Config = CONFIG) -> WorldModel:
    """A model whose final norm has weights and biases as unequal as those of a model after a long training."""
    torch.manual_seed(0)
    model = WorldModel(config).eval()
    norm = model.target_encoder.norm
    norm.weight.data = torch.randn_like(norm.weight).mul(0.5).exp()
    norm.bias.data = torch.randn_like(norm.bias).mul(0.3)
    return model


def _views(image: Tensor) -> Tensor:
    params = sample_photometric(bank_augmentation(CONFIG.views), 8, torch.Generator().manual_seed(0))
    return apply_photometric(image.expand(8, -1, -1, -1), params, "linear")


@torch.no_grad()
def test_target_features_of_a_view_re_enter_nearly_as_its_encoded_features(smooth_images: Tensor) -> None:
    model = _model()
    views = _views(smooth_images[0])
    source, encoded = model.encode(smooth_images[:1], "teacher"), model.encode(views, "teacher")
    targets = model.target_features(views)
    error = (reenter(model, targets, source) - encoded).norm() / encoded.norm()
    as_they_are = (targets - encoded).norm() / encoded.norm()
    assert error < 0.05
    assert as_they_are > 4 * error
    # With the statistics of the view itself nothing is lost.
    torch.testing.assert_close(reenter(model, targets, encoded), encoded, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_mean_and_deviation_of_each_token_are_those_of_the_source(smooth_images: Tensor) -> None:
    model = _model()
    source = model.encode(smooth_images, "teacher")
    again = reenter(model, torch.nn.functional.layer_norm(torch.randn_like(source), (48,)), source)
    torch.testing.assert_close(again.mean(-1), source.mean(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.std(-1), source.std(-1), atol=1e-4, rtol=1e-4)
    # A prediction that varies less than target features, because it is uncertain, remains so.
    torch.testing.assert_close(
        reenter(model, torch.zeros_like(source), source), source.mean(-1, keepdim=True).expand_as(source)
    )


@torch.no_grad()
def test_without_normalised_targets_a_prediction_re_enters_as_it_is(smooth_images: Tensor) -> None:
    model = _model(replace(CONFIG, loss=LossConfig(normalize_targets=False)))
    source = model.encode(smooth_images, "teacher")
    predictions = torch.randn_like(source)
    assert torch.equal(reenter(model, predictions, source), predictions)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@torch.no_grad()
def test_passes_in_a_row_are_single_passes_one_after_another(smooth_images: Tensor, batch_size: int) -> None:
    model = _model()
    source = model.encode(smooth_images, "student")
    actions = torch.randn(3, len(source), model.action_spec.size)
    expected = source
    for i, action in enumerate(actions):
        prediction = model.predict(expected, action)
        expected = reenter(model, prediction, source) if i < 2 else prediction
    torch.testing.assert_close(predict_in_a_row(model, source, actions, batch_size), expected, atol=1e-5, rtol=1e-5)

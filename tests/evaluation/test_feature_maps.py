"""Attention maps are the model's own attention, PCA maps show equal features in equal colours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dali_pipelines.views import SCENARIOS
from iwm.config import Config, ConfigError
from iwm.evaluation.feature_maps import (
    attention_entropy,
    attention_received,
    attention_weights,
    fit_patch_pca,
    last_attention,
    patch_features,
    strong_augmentation,
)
from iwm.evaluation.settings import FeatureMapSettings
from iwm.model_config import ActionConfig
from iwm.models.attention import set_attention_impl
from iwm.models.world_model import WorldModel
from iwm.protocols import evaluate
from tests.evaluation.conftest import untrained


@pytest.fixture(scope="module")
def model(config: Config) -> WorldModel:
    """Of two blocks, with attention that is far from even."""
    torch.manual_seed(0)
    made = WorldModel(replace(config, encoder=replace(config.encoder, depth=2))).eval().requires_grad_(False)
    for block in made.target_encoder.blocks:
        block.attn.qkv.weight.normal_(std=0.3)
        block.attn.qkv.bias.normal_(std=0.3)
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [False, True])
def test_weights_sum_to_one_and_applied_to_the_values_give_what_the_block_gives(
    model: WorldModel, images: Tensor, fused: bool
) -> None:
    set_attention_impl(model, fused)
    module = model.target_encoder.blocks[-1].attn
    calls: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    model.encode(images, "teacher")
    hook.remove()
    x, output = calls[0]
    weights = attention_weights(module, x)
    assert torch.allclose(weights.sum(3), torch.ones(3, 2, 16))
    assert weights.std() > 0.01
    values = module.qkv(x).chunk(3, dim=2)[2].unflatten(2, (2, 24)).transpose(1, 2)
    assert torch.allclose(module.proj((weights @ values).transpose(1, 2).flatten(2)), output, atol=1e-5)


def test_the_last_block_is_looked_at_and_nothing_is_left_behind(model: WorldModel, images: Tensor) -> None:
    encoder = model.target_encoder
    tokens = encoder.blocks[0](encoder.embed(images))
    expected = attention_weights(encoder.blocks[1].attn, encoder.blocks[1].norm1(tokens))
    assert torch.allclose(last_attention(encoder, images), expected, atol=1e-6)
    assert not encoder.blocks[-1].attn._forward_pre_hooks


def test_what_patches_receive_is_one_on_average_and_entropy_tells_even_from_single() -> None:
    even = torch.full((1, 1, 4, 4), 0.25)
    single = torch.zeros(1, 1, 4, 4)
    single[..., 2] = 1
    assert attention_received(even).tolist() == [[[1, 1, 1, 1]]]
    assert attention_received(single).tolist() == [[[0, 0, 4, 0]]]
    assert attention_entropy(torch.cat([even, single])).flatten().tolist() == pytest.approx([1, 0])


def test_three_components_hold_features_of_three_dimensions_and_colours_do_not_depend_on_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    components = fit_patch_pca(features)
    assert components.explained == pytest.approx(1)
    colours = components.colours(features)
    assert colours.min() == 0
    assert colours.max() == 1
    assert torch.allclose(fit_patch_pca(features[torch.randperm(200)]).colours(features), colours, atol=1e-9)
    below = features.double() - features.double().mean(0)
    strongest = torch.linalg.svd(below).S[0] ** 2 / below.square().sum()
    assert ((below @ components.directions[:, 0]).square().sum() / below.square().sum()).item() == pytest.approx(
        strongest.item()
    )


def test_predictions_of_a_model_that_is_told_nothing_are_the_same_for_both_actions(
    config: Config, images: Tensor
) -> None:
    params = strong_augmentation(config.views)
    for conditioning, same in (("none", True), ("feature", False)):
        told = WorldModel(replace(config, action=ActionConfig(conditioning=conditioning))).eval()
        _, features = patch_features(told, images, params)
        assert torch.equal(features["predicted, null action"], features["predicted, the action"]) == same
        # Of an untrained model student and teacher are one, and so are their features here.
        assert torch.equal(features["teacher"], features["student"])


def test_the_protocol_makes_both_figures_of_chosen_images_and_the_page_shows_them(run: Path) -> None:
    chosen = evaluate("feature-maps", FeatureMapSettings(checkpoint=run, num_images=3, seed=4))
    assert len(set(chosen["keys"])) == 3
    keys = tuple(reversed(chosen["keys"][:2]))
    result = evaluate("feature-maps", FeatureMapSettings(checkpoint=run, keys=keys, pca="each", query=(0.0, 0.9)))
    assert result["keys"] == list(keys)
    assert result["action"] == "brightness -0.40, contrast +0.40, saturation +0.20, hue +36°"
    assert 0 < result["explained"] <= 1
    assert len(result["entropy"]) == 2
    assert all(0 <= value <= 1 for value in result["entropy"])
    components, attention = result["figures"]
    for shown in (components, attention):
        assert [group["title"] for group in shown["groups"]] == list(keys)
    columns = [column["title"] for column in attention["groups"][0]["blocks"][0]["columns"]]
    assert columns == ["image", "from the patch", "received", "head 1", "head 2"]
    assert attention["scale"]["ticks"][0]["text"] == "0.00"
    page = (run / "report.html").read_text()
    assert "Patch features" in page
    assert page.count('class="exact"') == 2 * (5 + 4) + 1


def test_a_run_whose_target_is_destroyed_is_drawn_too(config: Config, tmp_path: Path) -> None:
    views = replace(SCENARIOS["strong"], target=SCENARIOS["strong"].source, size=32, jitter_impl="torchvision")
    run = untrained(tmp_path / "run", replace(config, views=views, action=ActionConfig(conditioning="sequence")))
    result = evaluate("feature-maps", FeatureMapSettings(checkpoint=run, num_images=1, precision="bf16"))
    assert "brightness -0.50" in result["action"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keys": ("val-00000", "nowhere")}, r"--keys: split 'val'.* has no nowhere"),
        ({"num_images": 0}, r"--num-images 0"),
        ({"query": (0.5, 1.0)}, r"--query 0.5 1"),
    ],
)
def test_settings_that_cannot_be_are_named(run: Path, settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        evaluate("feature-maps", FeatureMapSettings(checkpoint=run, **settings))

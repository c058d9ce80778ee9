"""Backbone: features at any size, intermediate layers, and the copy for finetuning."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from iwm.config import ConfigError
from iwm.model_config import EncoderConfig as EncoderConfig
from iwm.models.backbone import Backbone, frozen_backbone
from iwm.models.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder, timm_arguments
from iwm.models.external.loading import ExternalEncoder, MaeDecoder

SMALL = EncoderConfig(embed_dim=32, depth=3, num_heads=4, patch_size=8)
DIMENSIONS = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}


def ours() -> tuple[Encoder, VisionTransformer]:
    encoder = Encoder(SMALL, 32)
    stock = VisionTransformer(**timm_arguments(SMALL, 32))
    stock.load_state_dict(encoder.state_dict(), strict=True)
    return encoder, stock.eval()


def foreign(**options: object) -> tuple[ExternalEncoder, VisionTransformer]:
    """Return a backbone on a timm ViT, and the same ViT."""
    vit, stock = (VisionTransformer(img_size=32, **DIMENSIONS, **options) for _ in range(2))
    stock.load_state_dict(vit.state_dict(), strict=True)
    return ExternalEncoder("timm", vit, IMAGENET_MEAN, IMAGENET_STD).eval(), stock.eval()


def with_decoder() -> tuple[ExternalEncoder, VisionTransformer]:
    encoder, stock = foreign()
    encoder.predictor = MaeDecoder(width=32, own_width=16, depth=1, heads=2, hidden=32, grid=4, pixels=192)
    return encoder, stock


KINDS: dict[str, Callable[[], tuple[Encoder | ExternalEncoder, VisionTransformer]]] = {
    "ours": ours,
    "class token": with_decoder,
    "class token and registers": lambda: foreign(reg_tokens=2),
    "class token without a position": lambda: foreign(reg_tokens=1, no_embed_class=True, init_values=0.1),
    "rows and columns": lambda: foreign(dynamic_img_size=True),
    "no class token": lambda: foreign(class_token=False, global_pool="avg", fc_norm=True),
    "attention pooling": lambda: foreign(class_token=False, global_pool="map"),
}


def made(kind: str) -> tuple[Backbone, VisionTransformer]:
    torch.manual_seed(0)
    encoder, stock = KINDS[kind]()
    return frozen_backbone(encoder), stock


def pictures(height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(0, 256, (3, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(images: Tensor) -> Tensor:
    return ((images / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_vit(kind: str) -> None:
    backbone, stock = made(kind)
    expected = stock.forward_features(normalised(pictures()))
    torch.testing.assert_close(backbone.tokens(pictures()), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(backbone.patches(pictures()), expected[:, -16:], atol=2e-5, rtol=1e-4)
    assert backbone.num_prefix_tokens == expected.shape[1] - 16
    assert (backbone.embed_dim, backbone.img_size, backbone.patch_size, backbone.depth, backbone.num_heads) == (
        32,
        32,
        8,
        3,
        4,
    )


@pytest.mark.parametrize("kind", ["ours", "class token"])
def test_grey_levels_may_be_fractions(kind: str) -> None:
    """Mixed images are float: integer values as float give the same features, values between lie between."""
    backbone, stock = made(kind)
    assert torch.equal(backbone.tokens(pictures().float()), backbone.tokens(pictures()))
    mixed = pictures() * 0.7 + pictures().flip(0) * 0.3
    torch.testing.assert_close(backbone.tokens(mixed), stock.forward_features(normalised(mixed)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(48, 32), (16, 40)])
def test_positions_are_interpolated_for_other_heights_and_widths(kind: str, height: int, width: int) -> None:
    backbone, stock = made(kind)
    before = stock.pos_embed.shape[1] - 16
    grid = stock.pos_embed[:, before:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    other = F.interpolate(grid, size=(height // 8, width // 8), mode="bicubic", align_corners=False)
    stock.set_input_size((height, width))
    stock.pos_embed.data = torch.cat((stock.pos_embed[:, :before], other.flatten(2).transpose(1, 2)), dim=1)
    images = pictures(height, width)
    expected = stock.forward_features(normalised(images))
    torch.testing.assert_close(backbone.tokens(images), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ours", "class token"])
def test_a_size_that_cannot_be_cut_into_patches_is_refused_in_words(kind: str) -> None:
    with pytest.raises(ConfigError, match="images of 32×44 px cannot be cut into patches of 8 px"):
        made(kind)[0].get_intermediate_layers(pictures(32, 44))


@pytest.mark.parametrize("kind", ["ours", "class token and registers"])
def test_layers_are_the_last_blocks_outputs_normed(kind: str) -> None:
    backbone, stock = made(kind)
    layers = backbone.get_intermediate_layers(pictures(), 3)
    expected = stock.forward_intermediates(
        normalised(pictures()), indices=3, norm=True, intermediates_only=True, output_fmt="NLC"
    )
    for layer, other in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer, other, atol=2e-5, rtol=1e-4)
    assert torch.equal(layers[-1], backbone.patches(pictures()))
    with pytest.raises(ConfigError, match="count 4: the model has 3 blocks; use 1 to 3"):
        backbone.get_intermediate_layers(pictures())


def test_the_final_norm_is_on_all_layers_on_the_last_or_on_none() -> None:
    backbone, stock = made("ours")
    plain, normed = (
        stock.forward_intermediates(
            normalised(pictures()), indices=3, norm=norm, intermediates_only=True, output_fmt="NLC"
        )
        for norm in (False, True)
    )
    expected = {"shared": normed, "last": [*plain[:-1], normed[-1]], "own": plain, "none": plain}
    for kind, layers in expected.items():
        found = backbone.get_intermediate_layers(pictures(), 3, kind)
        torch.testing.assert_close(found, list(layers), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_copy_gives_every_parameter_a_gradient_and_leaves_the_original_alone(kind: str) -> None:
    backbone, _ = made(kind)
    trained = backbone.finetune_copy()
    assert torch.equal(trained.tokens(pictures()), backbone.tokens(pictures()))
    trained.patches(pictures()).square().sum().backward()
    for name, parameter in trained.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert (parameter.grad is None) or parameter.grad.abs().max() > 0, name
    untrained = {name for name, parameter in trained.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[2] if kind != "ours" else name for name in untrained} <= {
        "encoder.pos_embed",
        "fc_norm",
        "attn_pool",
    }
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    with torch.no_grad():
        trained.vit.blocks[0].mlp.fc1.weight.mul_(2)
    assert not torch.equal(trained.tokens(pictures()), backbone.tokens(pictures()))


@pytest.mark.parametrize("kind", ["ours", "class token"])
def test_drop_path_grows_linearly_with_depth_and_is_off_in_evaluation(kind: str) -> None:
    backbone, _ = made(kind)
    trained = backbone.finetune_copy(drop_path=0.2)
    rates = [
        [part.drop_prob if isinstance(part, DropPath) else 0.0 for part in (block.drop_path1, block.drop_path2)]
        for block in trained.vit.blocks
    ]
    assert rates == [[0.0, 0.0], [pytest.approx(0.1)] * 2, [pytest.approx(0.2)] * 2]
    assert torch.equal(trained.eval().tokens(pictures()), backbone.tokens(pictures()))
    kept = [trained.train().tokens(pictures()) for _ in range(10)]
    assert any(not torch.equal(kept[0], other) for other in kept)
    assert not any(isinstance(part, DropPath) for part in backbone.modules())


def test_recomputed_activations_drop_the_same_paths() -> None:
    gradients = []
    for grad_checkpointing in (False, True):
        trained = made("ours")[0].finetune_copy(drop_path=0.5, grad_checkpointing=grad_checkpointing)
        torch.manual_seed(3)
        sum(layer.square().sum() for layer in trained.get_intermediate_layers(pictures(), 2)).backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_compiled_backbone_has_the_same_features_and_its_trained_copy_is_its_own() -> None:
    """The copy must not call compiled functions of the original."""
    backbone, stock = made("ours")
    del backbone.vit.blocks[1:], stock.blocks[1:]
    compiled = backbone.setup(torch.device("cpu"), compiled=True)
    expected = stock.forward_features(normalised(pictures()))
    with torch.no_grad():
        torch.testing.assert_close(compiled.tokens(pictures()), expected, atol=2e-5, rtol=1e-4)
    trained = compiled.finetune_copy(drop_path=0.1).setup(torch.device("cpu"), compiled=True)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.zero_()
    assert trained.tokens(pictures()).abs().max() == 0
    with torch.no_grad():
        torch.testing.assert_close(compiled.tokens(pictures()), expected, atol=2e-5, rtol=1e-4)


def test_bfloat16_features_are_near() -> None:
    backbone, _ = made("ours")
    exact = backbone.tokens(pictures())
    with torch.autocast("cpu", torch.bfloat16):
        assert (backbone.tokens(pictures()) - exact).abs().max() < 0.1

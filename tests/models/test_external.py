"""External encoders: published files give the features of a reference ViT written here."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from iwm.models.external.loading import FORMATS, ExternalCheckpointError, load_external
from tests.models.published import PUBLISHED, blocks, decoder_state, pictures, published, reference, vit_state


def test_the_names_are_those_of_timm_which_all_five_projects_took() -> None:
    for class_token in (True, False):
        stock = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            num_classes=0,
            class_token=class_token,
            global_pool="token" if class_token else "avg",
            fc_norm=False,
        )
        shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in vit_state(class_token=class_token).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_has_the_features_of_its_vit(name: str, tmp_path: Path) -> None:
    kind, path, state = published(name, tmp_path)
    encoder = load_external(kind, path, heads=4)
    expected = reference(state, pictures(), heads=4)
    skipped = 0 if kind == "ijepa" else 1
    torch.testing.assert_close(encoder(pictures()), expected[:, skipped:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.tokens(pictures()), expected, atol=1e-5, rtol=1e-4)
    if skipped:
        torch.testing.assert_close(encoder.class_token(pictures()), expected[:, 0], atol=1e-5, rtol=1e-4)
    else:
        with pytest.raises(ExternalCheckpointError, match="ijepa has no class token"):
            encoder.class_token(pictures())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.training
    assert (encoder.img_size, encoder.patch_size, encoder.grid_size, encoder.embed_dim) == (32, 8, 4, 32)


@pytest.mark.parametrize(("kind", "heads"), [("moco_v3", 12), ("dino", 6), ("ibot", 6)])
def test_a_published_width_has_its_published_heads(kind: str, heads: int, tmp_path: Path) -> None:
    """ViT-S has 12 heads in MoCo v3 and 6 elsewhere: the tensors would load either way."""
    _, path, state = published(kind, tmp_path, vit_state(width=384, depth=1))
    expected = reference(state, pictures(), heads)[:, 1:]
    torch.testing.assert_close(load_external(kind, path)(pictures()), expected, atol=1e-4, rtol=1e-3)
    other = 12 if heads == 6 else 6
    assert not torch.allclose(load_external(kind, path, heads=other)(pictures()), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["mae", "ijepa"])
def test_positions_are_interpolated_for_another_image_size(name: str, tmp_path: Path) -> None:
    kind, path, state = published(name, tmp_path)
    first = 0 if kind == "ijepa" else 1
    grid = state["pos_embed"][:, first:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    state = {**state, "pos_embed": torch.cat((state["pos_embed"][:, :first], larger), dim=1)}
    features = load_external(kind, path, heads=4, image_size=48)(pictures(48))
    torch.testing.assert_close(features, reference(state, pictures(48), 4)[:, first:], atol=1e-5, rtol=1e-4)
    with pytest.raises(ExternalCheckpointError, match="image_size 50 is not a multiple of the patch size, 8 px"):
        load_external(kind, path, heads=4, image_size=50)
    with pytest.raises(ExternalCheckpointError, match=r"32×32 px, .* load it with image_size=32"):
        load_external(kind, path, heads=4, image_size=48)(pictures(32))


def test_maes_decoder_sees_every_position_and_is_asked_for_every_position(tmp_path: Path) -> None:
    kind, path, state = published("mae with decoder", tmp_path)
    encoder = load_external(kind, path, heads=4, predictor=True, predictor_heads=3)
    assert encoder.predictor is not None
    d = decoder_state()
    tokens = reference(state, pictures(), 4)
    seen = F.linear(tokens, d["decoder_embed.weight"], d["decoder_embed.bias"]) + d["decoder_pos_embed"]
    asked = (d["mask_token"] + d["decoder_pos_embed"][:, 1:]).expand(2, -1, -1)
    x = blocks(torch.cat((seen, asked), dim=1), d, "decoder_blocks", heads=3)[:, -16:]
    x = F.layer_norm(x, (24,), d["decoder_norm.weight"], d["decoder_norm.bias"], eps=1e-6)
    torch.testing.assert_close(encoder.predictor(encoder.tokens(pictures())), x, atol=1e-5, rtol=1e-4)
    pixels = F.linear(x, d["decoder_pred.weight"], d["decoder_pred.bias"])
    torch.testing.assert_close(encoder.predictor.pixels(encoder.tokens(pictures())), pixels, atol=1e-5, rtol=1e-4)
    larger = load_external(kind, path, heads=4, predictor=True, predictor_heads=3, image_size=48)
    assert larger.predictor is not None
    assert larger.predictor(larger.tokens(pictures(48))).shape == (2, 36, 24)


def test_a_decoder_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    kind, path, _ = published("mae", tmp_path)
    with pytest.raises(ExternalCheckpointError, match="encoder alone; files with the decoder are mae_visualize"):
        load_external(kind, path, heads=4, predictor=True)
    with pytest.raises(ExternalCheckpointError, match="only mae and ijepa have a predictor or decoder"):
        load_external("dino", path, heads=4, predictor=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_of_another_kind_is_told_apart(name: str, tmp_path: Path) -> None:
    kind, path, _ = published(name, tmp_path)
    # A file with nothing but a ViT is the same in DINO and iBOT.
    alike = ["dino", "ibot"] if name in ("dino", "ibot, flat") else [kind]
    for wrong in (each for each in FORMATS if each not in alike):
        message = f"is not a checkpoint in the format {wrong}: it looks like {' or '.join(alike)}$"
        with pytest.raises(ExternalCheckpointError, match=message):
            load_external(wrong, path, heads=4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_unexpected_and_misshaped_tensors_are_named(name: str, tmp_path: Path) -> None:
    whole = vit_state(class_token=PUBLISHED[name][0] != "ijepa")
    faults = {
        "blocks.1.norm2.bias is missing": {key: whole[key] for key in whole if key != "blocks.1.norm2.bias"},
        "patch_embed.proj.weight is missing": {key: whole[key] for key in whole if key != "patch_embed.proj.weight"},
        "fc_norm.weight is unexpected": {**whole, "fc_norm.weight": torch.zeros(32)},
        r"norm.bias is \[31\], not \[32\]": {**whole, "norm.bias": torch.zeros(31)},
        "positions, not a square": {**whole, "pos_embed": torch.zeros(1, 15, 32)},
        r"pos_embed is \[1, 1[67], 30\]": {**whole, "pos_embed": whole["pos_embed"][..., :30]},
    }
    for told, state in faults.items():
        kind, path, _ = published(name, tmp_path, state)
        with pytest.raises(ExternalCheckpointError, match=told):
            load_external(kind, path, heads=4)


def test_maes_decoder_is_loaded_strictly_too(tmp_path: Path) -> None:
    content = {"model": {**vit_state(), **decoder_state()}}
    del content["model"]["decoder_norm.bias"]
    torch.save(content, tmp_path / "cut.pth")
    with pytest.raises(ExternalCheckpointError, match=r"decoder_norm.bias is missing"):
        load_external("mae", tmp_path / "cut.pth", heads=4, predictor=True, predictor_heads=3)


def test_what_is_no_checkpoint_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ExternalCheckpointError, match=r"nowhere.pth does not exist"):
        load_external("mae", tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ExternalCheckpointError, match=r"text.pth is damaged"):
        load_external("mae", tmp_path / "text.pth")
    torch.save({"model": {}, "format": 1, "config": {}}, tmp_path / "ours.pt")
    with pytest.raises(ExternalCheckpointError, match=r"a checkpoint of this program, for iwm.load"):
        load_external("dino", tmp_path / "ours.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(
        ExternalCheckpointError, match="looks like none of mae, ijepa, moco_v3, dino, ibot; it holds weights"
    ):
        load_external("dino", tmp_path / "other.pt")
    _, path, _ = published("dino", tmp_path)
    with pytest.raises(ExternalCheckpointError, match=r"width of 32 was never published .* give --external\.heads"):
        load_external("dino", path)
    with pytest.raises(ExternalCheckpointError, match=r"--external\.heads 5 does not divide the width 32"):
        load_external("dino", path, heads=5)
    with pytest.raises(ExternalCheckpointError, match="format 'simclr' does not exist"):
        load_external("simclr", path)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_any_vit_of_timms_with_its_own_normalisation(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(0)
    stock = timm.create_model("test_vit", num_classes=10).eval()
    path = tmp_path / f"vit.{ending}"
    save_file(stock.state_dict(), path) if ending == "safetensors" else torch.save(stock.state_dict(), path)
    encoder = load_external("timm", path, name="test_vit")
    pixels = (pictures(encoder.img_size) / 255 - 0.5) / 0.5
    expected = stock.forward_features(pixels.permute(0, 3, 1, 2))[:, stock.num_prefix_tokens :]
    torch.testing.assert_close(encoder(pictures(encoder.img_size)), expected, atol=1e-5, rtol=1e-4)
    smaller = load_external("timm", path, name="test_vit", image_size=96)
    assert smaller(pictures(96)).shape == (2, 36, encoder.embed_dim)


def test_timm_models_that_are_no_vit_or_have_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExternalCheckpointError, match="'resnetty' is not one"):
        load_external("timm", None, name="resnetty")
    with pytest.raises(ExternalCheckpointError, match="no pretrained weights for vit_giant_patch14_224"):
        load_external("timm", None, name="vit_giant_patch14_224")
    with pytest.raises(ExternalCheckpointError, match="not a VisionTransformer"):
        load_external("timm", tmp_path / "any.pth", name="test_resnet")
    with pytest.raises(ExternalCheckpointError, match="a name is for format timm"):
        load_external("mae", None)

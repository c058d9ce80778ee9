"""External encoders: published files give the features of a reference ViT written here."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from iwm.models.external.loading import FORMATS, ExternalCheckpointError, load_external

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
State = dict[str, Tensor]


def block_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        **{f"{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")},
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
        "mlp.fc2.bias": (width,),
    }


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def vit_state(width: int = 32, depth: int = 2, class_token: bool = True, seed: int = 0) -> State:
    """Return the state of a ViT with patches of 8 px for images of 32 px, with timm's names."""
    shapes: dict[str, tuple[int, ...]] = {
        **({"cls_token": (1, 1, width)} if class_token else {}),
        "pos_embed": (1, 16 + class_token, width),
        "patch_embed.proj.weight": (width, 3, 8, 8),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block_shapes(width, 4 * width).items()}
    return drawn(shapes, seed)


def decoder_state(width: int = 32, own: int = 24, depth: int = 2) -> State:
    """Return the state of MAE's decoder with the names of models_mae.py."""
    shapes: dict[str, tuple[int, ...]] = {
        "mask_token": (1, 1, own),
        "decoder_pos_embed": (1, 17, own),
        "decoder_embed.weight": (own, width),
        "decoder_embed.bias": (own,),
        "decoder_norm.weight": (own,),
        "decoder_norm.bias": (own,),
        "decoder_pred.weight": (192, own),
        "decoder_pred.bias": (192,),
    }
    for i in range(depth):
        shapes |= {f"decoder_blocks.{i}.{name}": shape for name, shape in block_shapes(own, 4 * own).items()}
    return drawn(shapes, 5)


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


OPTIONS = argparse.Namespace(arch="vit", epochs=300)
HEAD = {"head.mlp.0.weight": torch.zeros(4, 32), "head.last_layer.weight_g": torch.ones(4, 1)}


def moco(state: State) -> dict[str, Any]:
    """Return a checkpoint as main_moco.py saves it: both encoders with projection heads, and the predictor."""
    other = {**vit_state(state["norm.weight"].numel(), seed=9), "head.0.weight": torch.zeros(4, 32)}
    base = under("module.base_encoder.", {**state, "head.0.weight": torch.zeros(4, 32)})
    momentum = under("module.momentum_encoder.", other)
    predictor = {"module.predictor.0.weight": torch.zeros(4, 4)}
    return {"epoch": 300, "arch": "vit_base", "state_dict": {**base, **momentum, **predictor}, "optimizer": {}}


def ijepa(state: State) -> dict[str, Any]:
    other = vit_state(class_token=False, seed=9)
    predictor = {"module.mask_token": torch.zeros(1, 1, 8)}
    encoders = {"encoder": under("module.", other), "target_encoder": under("module.", state)}
    return {**encoders, "predictor": predictor, "opt": {}, "scaler": None, "epoch": 300, "loss": 0.1, "lr": 1e-3}


def dino_full(state: State) -> dict[str, Any]:
    student = {**under("module.backbone.", vit_state(seed=9)), **under("module.", HEAD)}
    teacher = {**under("backbone.", state), **HEAD}
    return {"student": student, "teacher": teacher, "epoch": 1, "args": OPTIONS, "dino_loss": {}}


def ibot_full(state: State) -> dict[str, Any]:
    student = {**under("module.backbone.", vit_state(seed=9)), "module.backbone.masked_embed": torch.zeros(1, 32)}
    teacher = {**under("module.backbone.", state), **under("module.", HEAD)}
    return {"student": student, "teacher": teacher, "epoch": 1, "args": OPTIONS, "ibot_loss": {}}


PUBLISHED: dict[str, tuple[str, Callable[[State], dict[str, Any]]]] = {
    "mae": ("mae", lambda state: {"model": state}),
    "mae with decoder": ("mae", lambda state: {"model": {**state, **decoder_state()}, "args": OPTIONS, "epoch": 1}),
    "ijepa": ("ijepa", ijepa),
    "moco_v3": ("moco_v3", moco),
    "dino": ("dino", dict),
    "dino, all of it": ("dino", dino_full),
    "ibot": ("ibot", lambda state: {"state_dict": state}),
    "ibot, all of it": ("ibot", ibot_full),
}


def published(name: str, tmp_path: Path, state: State | None = None) -> tuple[str, Path, State]:
    kind, wrap = PUBLISHED[name]
    state = vit_state(class_token=kind != "ijepa") if state is None else state
    torch.save(wrap(state), tmp_path / "published.pth")
    return kind, tmp_path / "published.pth", state


def pictures(size: int = 32) -> Tensor:
    return torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def blocks(x: Tensor, state: State, name: str, heads: int) -> Tensor:
    """Run the blocks of a ViT, as a reference implementation."""

    def part(key: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.{i}.{key}.weight"], state[f"{name}.{i}.{key}.bias"]

    width, i = x.shape[-1], 0
    while f"{name}.{i}.norm1.weight" in state:
        q, k, v = F.linear(F.layer_norm(x, (width,), *part("norm1"), eps=1e-6), *part("attn.qkv")).split(width, -1)
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1)
        x = x + F.linear((weights @ v).transpose(1, 2).flatten(2), *part("attn.proj"))
        inner = F.linear(F.layer_norm(x, (width,), *part("norm2"), eps=1e-6), *part("mlp.fc1"))
        x = x + F.linear(F.gelu(inner), *part("mlp.fc2"))
        i += 1
    return x


def reference(state: State, images: Tensor, heads: int) -> Tensor:
    """Return all tokens of a reference ViT, with its class token first where it has one."""
    pixels = ((images / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    if "cls_token" in state:
        x = torch.cat((state["cls_token"].expand(len(x), -1, -1), x), dim=1)
    x = blocks(x + state["pos_embed"], state, "blocks", heads)
    return F.layer_norm(x, x.shape[-1:], state["norm.weight"], state["norm.bias"], eps=1e-6)


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
    encoder = load_external(kind, path, heads=4, decoder=True, decoder_heads=3)
    assert encoder.decoder is not None
    d = decoder_state()
    tokens = reference(state, pictures(), 4)
    seen = F.linear(tokens, d["decoder_embed.weight"], d["decoder_embed.bias"]) + d["decoder_pos_embed"]
    asked = (d["mask_token"] + d["decoder_pos_embed"][:, 1:]).expand(2, -1, -1)
    x = blocks(torch.cat((seen, asked), dim=1), d, "decoder_blocks", heads=3)[:, -16:]
    x = F.layer_norm(x, (24,), d["decoder_norm.weight"], d["decoder_norm.bias"], eps=1e-6)
    torch.testing.assert_close(encoder.decoder(encoder.tokens(pictures())), x, atol=1e-5, rtol=1e-4)
    pixels = F.linear(x, d["decoder_pred.weight"], d["decoder_pred.bias"])
    torch.testing.assert_close(encoder.decoder.pixels(encoder.tokens(pictures())), pixels, atol=1e-5, rtol=1e-4)
    larger = load_external(kind, path, heads=4, decoder=True, decoder_heads=3, image_size=48)
    assert larger.decoder is not None
    assert larger.decoder(larger.tokens(pictures(48))).shape == (2, 36, 24)


def test_a_decoder_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    kind, path, _ = published("mae", tmp_path)
    with pytest.raises(ExternalCheckpointError, match="encoder alone; files with the decoder are mae_visualize"):
        load_external(kind, path, heads=4, decoder=True)
    with pytest.raises(ExternalCheckpointError, match="only mae has a decoder"):
        load_external("dino", path, heads=4, decoder=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_of_another_kind_is_told_apart(name: str, tmp_path: Path) -> None:
    kind, path, _ = published(name, tmp_path)
    for wrong in (each for each in FORMATS if each != kind):
        message = f"is not a checkpoint in the format {wrong}: it looks like {kind}$"
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
        load_external("mae", tmp_path / "cut.pth", heads=4, decoder=True, decoder_heads=3)


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
    with pytest.raises(ExternalCheckpointError, match="width of 32 was never published"):
        load_external("dino", path)
    with pytest.raises(ExternalCheckpointError, match="heads=5 does not divide the width 32"):
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

"""Files of other projects as their authors' code writes them, small, and a reference ViT to compare with."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iwm.models.layers import sincos_positions

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


def ijepa_predictor_state(width: int = 32, own: int = 32, depth: int = 1, grid: int = 4) -> State:
    """Return the state of I-JEPA's predictor with the names of its vision_transformer.py."""
    shapes: dict[str, tuple[int, ...]] = {
        "mask_token": (1, 1, own),
        "predictor_embed.weight": (own, width),
        "predictor_embed.bias": (own,),
        "predictor_norm.weight": (own,),
        "predictor_norm.bias": (own,),
        "predictor_proj.weight": (width, own),
        "predictor_proj.bias": (width,),
    }
    for i in range(depth):
        shapes |= {f"predictor_blocks.{i}.{name}": shape for name, shape in block_shapes(own, 4 * own).items()}
    return {**drawn(shapes, 6), "predictor_pos_embed": sincos_positions(own, grid)[None]}


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
    predictor = under("module.", ijepa_predictor_state())
    encoders = {"encoder": under("module.", other), "target_encoder": under("module.", state)}
    return {**encoders, "predictor": predictor, "opt": {}, "scaler": None, "epoch": 300, "loss": 0.1, "lr": 1e-3}


def with_mask_token(state: State) -> State:
    """Return the backbone as iBOT's code has it when it masks images."""
    return {**state, "masked_embed": torch.ones(1, state["norm.weight"].numel())}


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
    "ibot, extracted": ("ibot", lambda state: {"state_dict": with_mask_token(state) | under("module.", HEAD)}),
    "ibot, flat": ("ibot", lambda state: with_mask_token(state)),
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

"""What the patches of an image attend to in an encoder's last block."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from iwm.models.attention import Attention
from iwm.models.encoder import Encoder


@torch.no_grad()
def attention_weights(module: Attention, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n n"]:
    """How much each token (rows, which sum to 1) takes from each other (columns), in every head; float32.

    `x` is what the module is given: the block's tokens, normed.
    """
    with torch.autocast(x.device.type, enabled=False):
        q, k, _ = module.qkv(x.float()).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = module.q_norm(q), module.k_norm(k)
        weights: Tensor = (q * module.scale @ k.transpose(2, 3)).softmax(dim=3)
    return weights


@torch.no_grad()
def last_attention(encoder: Encoder, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b h n n"]:
    """Attention weights of the encoder's last block for whole images."""
    module = encoder.blocks[-1].attn
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = module.register_forward_pre_hook(keep)
    try:
        encoder(images)
    finally:
        hook.remove()
    return attention_weights(module, seen[0])


def received(weights: Float[Tensor, "b h n n"]) -> Float[Tensor, "b h n"]:
    """Attention that each patch receives, averaged over the patches that attend, times n: 1 is an equal share."""
    return weights.mean(2) * weights.shape[3]


def entropy(weights: Float[Tensor, "b h n n"]) -> Float[Tensor, "b h"]:
    """Mean entropy of a head's attention, as a share of the largest: 0 one patch alone, 1 all patches alike."""
    if weights.shape[3] == 1:
        return torch.ones_like(weights[:, :, 0, 0])
    return -torch.special.xlogy(weights, weights).sum(3).mean(2) / math.log(weights.shape[3])

"""Tokens that the loss compares: which ones, in one buffer, and with which weight.

The last MLP of the target encoder and of the predictor, and all that follows, run on these tokens alone: 94 of 196
patches with the paper's masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from iwm.model_config import LossConfig
from iwm.packing import BufferSize


class LossTokens(NamedTuple):
    """Tokens that the loss compares, image by image, in a buffer of t tokens. Padding has weight 0."""

    prediction_index: Int64[Tensor, "t"]
    """Index of each token in the predictor's flattened input sequences. All are distinct, those of padding too."""
    target_index: Int64[Tensor, "t"]
    """Index of each token in the flattened patches of the target images."""
    weight: Float[Tensor, "t"]
    """Weight of each token's distance in the loss."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> LossTokens:
        """Apply `function` to each tensor and return the new tokens."""
        return LossTokens(*map(function, self))


def loss_mask(
    visible: Bool[Tensor, "b n"], predicted: Bool[Tensor, "b m n"], loss: LossConfig
) -> Bool[Tensor, "b m n"]:
    """Return the mask of the tokens that the loss is computed over (loss.predict)."""
    return predicted | visible[:, None] if loss.predict == "all" else predicted


def loss_weights(counted: Bool[Tensor, "b m n"], loss: LossConfig) -> Float[Tensor, "b m n"]:
    """Return the weights of the counted tokens, 0 for others: all predictions have the same weight (loss.reduction)."""
    rows = counted.shape[0] * counted.shape[1]
    tokens = counted.sum(dim=-1, keepdim=True).clamp(min=1) if loss.reduction == "mean" else 1
    return counted / tokens / rows


def pack_loss_tokens(
    counted: Bool[Tensor, "b m n"], in_predictor: Bool[Tensor, " s"], loss: LossConfig, fixed: BufferSize | None
) -> LossTokens:
    """Pack the counted tokens, on the host.

    in_predictor: the counted tokens among all tokens of the predictor's flattened input. fixed: a static shape,
    enlarged where the tokens do not fit; None: exactly the counted tokens.
    """
    image, _, patch = counted.nonzero().unbind(1)
    total = len(image)
    size = total if fixed is None else min(fixed.enlarged(total), len(in_predictor))
    places = in_predictor.nonzero()[:, 0]
    unused = (~in_predictor).nonzero()[: size - total, 0]
    padding = (0, size - total)
    return LossTokens(
        torch.cat((places, unused)),
        F.pad(image * counted.shape[-1] + patch, padding),
        F.pad(loss_weights(counted, loss)[counted], padding),
    )

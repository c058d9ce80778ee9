"""Analytic FLOPs of training, and what this machine's matrix product reaches: the two halves of MFU."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from iwm.actions import action_spec
from iwm.config import Config
from iwm.masking import rooms, token_statistics


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per image of one training step (a multiply and an add are two), attention included.

    Only tokens that are needed count: padding is not work. Backward is twice forward; the target encoder has none.
    """

    context_encoder: float
    target_encoder: float
    predictor: float

    @property
    def total(self) -> float:
        return self.context_encoder + self.target_encoder + self.predictor


def training_flops(config: Config, visible: float | None = None) -> Flops:
    """FLOPs per image of `config`. visible: mean number of visible patches; None: that of the configured masks."""
    n = config.grid**2
    e = config.encoder
    visible = token_statistics(config.masking, config.grid).visible if visible is None else visible
    context = 3 * transformer_flops(visible, e.width, e.depth, e.mlp_ratio) + 2 * embedding_flops(config, visible)
    teacher = transformer_flops(n, e.width, e.depth, e.mlp_ratio) + embedding_flops(config, n)
    if config.masking.kind == "ijepa":
        low, high = config.masking.area
        passes, tokens = config.masking.blocks, visible + n * (low + high) / 2
    else:
        passes, tokens = 1, float(n)
    predictor = 3 * passes * predictor_flops(config, visible, tokens)
    return Flops(context, teacher, predictor)


def transformer_flops(tokens: float, width: int, depth: int, mlp_ratio: float) -> float:
    """Forward pass of one sequence: projections and MLP on each token, then queries by keys and weights by values."""
    per_token = 2 * width * width * (4 + 2 * mlp_ratio)
    return depth * (tokens * per_token + 4 * tokens * tokens * width)


def embedding_flops(config: Config, tokens: float) -> float:
    """Forward pass of the patch embedding. Its input needs no gradient, so training costs twice this, not thrice."""
    return 2 * tokens * 3 * config.encoder.patch**2 * config.encoder.width


def predictor_flops(config: Config, visible: float, tokens: float) -> float:
    """One forward pass of the predictor: projection in (visible tokens), conditioning, blocks, projection out."""
    p, encoder_width = config.predictor, config.encoder.width
    k = action_spec(config.action, config.views).size
    extra = k if config.action.conditioning == "sequence" else 0
    flops = transformer_flops(tokens + extra, p.width, p.depth, p.mlp_ratio)
    flops += 2 * (visible + tokens) * p.width * encoder_width
    if config.action.conditioning == "feature":
        # Of the first layer only the action's part is computed per image; that of the positions, once per batch.
        flops += 2 * p.width * (k + 2 * config.grid**2 * p.width)
    return flops


@dataclass(frozen=True)
class TokenRatio:
    """Tokens processed by a compiled step over tokens needed; what is above 1 is filling of packed buffers."""

    context_encoder: float
    predictor: float
    step: float
    """Of all three parts together; the target encoder has no filling."""


def token_ratio(config: Config, images: int) -> TokenRatio:
    """For steps of `images` per process in one pass. Eager steps have no filling: theirs is 1."""
    n, separate = config.grid**2, config.masking.kind == "ijepa"
    tokens, buffers = token_statistics(config.masking, config.grid), rooms(config.masking, config.grid, 0, images)
    context, needed = buffers.context.tokens / images, tokens.predicted if separate else n
    predictor = buffers.rows.tokens / images if separate else n
    step = (context + n + predictor) / (tokens.visible + n + needed)
    return TokenRatio(context / tokens.visible, predictor / needed, step)


def measured_peak(device: torch.device, precision: str, size: int | None = None, repeats: int = 5) -> float:
    """FLOP/s of a square matrix product in the run's precision on this machine, the median of `repeats`."""
    size = size or (8192 if device.type == "cuda" else 2048)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Random numbers of its own: drawing from torch's would change what a run that measures this draws after it.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds[1:])[repeats // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

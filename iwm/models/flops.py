"""Model FLOPs utilisation (MFU): analytic FLOPs of training, and measured FLOP/s of a matrix product."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from iwm.actions import action_spec
from iwm.compat import synchronize
from iwm.config import Config
from iwm.masking import token_statistics
from iwm.models.predictor import CONDITIONING


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per image of one training step, attention included; a multiply-add counts as two.

    Padding is not counted. The backward pass counts twice the forward pass; the target encoder has none.
    """

    context_encoder: float
    target_encoder: float
    predictor: float

    @property
    def total(self) -> float:
        return self.context_encoder + self.target_encoder + self.predictor


def training_flops(config: Config, visible: float | None = None) -> Flops:
    """Compute the training FLOPs per image. visible: mean number of visible patches; None: that of `config`'s masks."""
    n = config.grid_size**2
    e = config.encoder
    statistics = token_statistics(config.masking, config.grid_size)
    visible = statistics.visible if visible is None else visible
    context = 3 * transformer_flops(visible, e.embed_dim, e.depth, e.mlp_ratio) + 2 * embedding_flops(config, visible)
    passes, tokens, compared = 1, float(n), n - visible
    if config.masking.type == "ijepa":
        passes, compared = config.masking.num_blocks, statistics.predicted
        tokens = visible + compared / passes
    if config.loss.predict == "all":
        compared = n
    teacher = transformer_flops(n, e.embed_dim, e.depth, e.mlp_ratio, compared) + embedding_flops(config, n)
    predictor = 3 * passes * predictor_flops(config, visible, tokens, compared / passes)
    return Flops(context, teacher, predictor)


def transformer_flops(tokens: float, width: int, depth: int, mlp_ratio: float, selected: float | None = None) -> float:
    """Compute the FLOPs of one sequence's forward pass: projections and MLP, then the two products of attention.

    selected: number of tokens in the last block's MLP; None: all.
    """
    attention = tokens * 8 * width * width + 4 * tokens * tokens * width
    mlp = 4 * mlp_ratio * width * width
    return depth * attention + mlp * ((depth - 1) * tokens + (tokens if selected is None else selected))


def embedding_flops(config: Config, tokens: float) -> float:
    """Compute the FLOPs of the patch embedding's forward pass.

    Its input needs no gradient, so training costs twice this number, not three times.
    """
    return 2 * tokens * 3 * config.encoder.patch_size**2 * config.encoder.embed_dim


def predictor_flops(config: Config, visible: float, tokens: float, selected: float | None = None) -> float:
    """Compute the FLOPs of the predictor's forward pass: input projection, conditioning, blocks, output projection.

    selected: number of tokens whose features are predicted; None: all.
    """
    p, encoder_width = config.predictor, config.encoder.embed_dim
    k = action_spec(config.action, config.views).size
    conditioning = CONDITIONING[config.action.conditioning]
    sequence = tokens + conditioning.num_tokens(k)
    flops = transformer_flops(sequence, p.embed_dim, p.depth, p.mlp_ratio, selected)
    flops += 2 * (visible + (tokens if selected is None else selected)) * p.embed_dim * encoder_width
    return flops + conditioning.flops(p.embed_dim, k, config.grid_size**2)


def measure_matmul_flops(device: torch.device, precision: str, size: int | None = None, repeats: int = 5) -> float:
    """Measure the FLOP/s of a square matrix product in the run's precision; return the median of `repeats`.

    For fp8 it is bf16's product: attention and the other products stay in bf16, and the MFU of a run in fp8 (which can
    exceed 1) and that of the same run in bf16 compare as their speeds do.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    # A separate generator: sampling from torch's global one would change the random values of the calling run.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds[1:])[repeats // 2]

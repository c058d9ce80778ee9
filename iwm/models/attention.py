"""Self-attention of dense rows and packed sequences."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.profiler import ProfilerActivity, profile

from iwm.compat import HAS_TRITON, REPLANS_CUDNN_VARLEN, matmul_dtype
from iwm.kernels.bf16_weights import linear
from iwm.kernels.short_attention import LONGEST, projected_attention, short_attention
from iwm.packing import Packing, gather_unique
from iwm.train_config import AttentionImpl


class Attention(TimmAttention):
    """timm's Attention with the same parameters, which also takes packed tokens.

    With a Packing as `attn_mask` (timm's Block passes it on), x is one row of packed tokens [1, t, d], and each token
    attends to its own sequence alone. On a GPU in bf16 this uses variable-length kernels. Elsewhere queries, keys and
    values are padded to rows of one width; projections and MLP never process that padding.
    """

    short = False
    """Use the project's own kernels (short_attention.py) for sequences of at most 256 tokens in bf16 on a GPU."""

    def forward(
        self, x: Float[Tensor, "b t d"], attn_mask: Packing | Tensor | None = None, is_causal: bool = False
    ) -> Float[Tensor, "b t d"]:
        assert not is_causal  # newer timm's Block passes it on; no block of this project sets it
        if isinstance(attn_mask, Tensor):
            plain: Tensor = super().forward(x, attn_mask)
            return plain
        return linear(self.proj, self.attend(x, attn_mask))

    def attend(self, x: Float[Tensor, "b t d"], packing: Packing | None) -> Float[Tensor, "b t d"]:
        """Return the attended values of all heads, which `proj` maps to the layer's output."""
        rows = x.flatten(0, 1)
        longest = x.shape[1] if packing is None else packing.token_mask.shape[1]
        if self._uses_short_kernels(x, packing, longest):
            offsets = None if packing is None else packing.cu_seqlens
            if type(self.qkv) is nn.Linear:
                return projected_attention(rows, self.qkv, self.num_heads, offsets, longest).view_as(x)
            # A subclass (float8) computes another product.
            return short_attention(self.qkv(rows), self.num_heads, offsets, longest).view_as(x)
        qkv = linear(self.qkv, rows)
        if packing is None:
            q, k, v = qkv.view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            return attention(q, k, v, None, self.fused_attn).transpose(1, 2).reshape_as(x)
        varlen = self.fused_attn and qkv.is_cuda and qkv.dtype == torch.bfloat16
        attended = (_attend_varlen if varlen else _attend_padded)(qkv, packing, self.num_heads, self.fused_attn)
        return attended.view_as(x)

    def _uses_short_kernels(self, x: Tensor, packing: Packing | None, longest: int) -> bool:
        if packing is None and self.head_dim > 32 and not torch.is_grad_enabled():
            return False  # cuDNN's forward pass is faster there: 164 against 182 µs (H100, 256 × 196 tokens, 12 × 64)
        return self.short and x.is_cuda and longest <= LONGEST and matmul_dtype(x) == torch.bfloat16


def _attend_varlen(qkv: Float[Tensor, "t d3"], packing: Packing, heads: int, fused: bool) -> Float[Tensor, "t d"]:
    q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    longest = packing.token_mask.shape[1]
    # cuDNN does not support windows, so a window as wide as the longest sequence selects flash attention, where it has
    # no effect.
    flash = REPLANS_CUDNN_VARLEN or torch.are_deterministic_algorithms_enabled()
    window = (longest, longest) if flash else (-1, -1)
    out = varlen_attn(q, k, v, packing.cu_seqlens, packing.cu_seqlens, longest, longest, window_size=window)
    assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are requested
    return out.flatten(1)


def _attend_padded(qkv: Float[Tensor, "t d3"], packing: Packing, heads: int, fused: bool) -> Float[Tensor, "t d"]:
    present = packing.token_mask
    rows = qkv.new_zeros(present.numel(), qkv.shape[1]).index_copy(0, packing.padded_index, qkv)
    q, k, v = rows.view(*present.shape, 3, heads, -1).permute(2, 0, 3, 1, 4)
    attended = attention(q, k, v, present, fused)
    return gather_unique(attended.transpose(1, 2).reshape(present.numel(), -1), packing.padded_index)


def attention(
    q: Float[Tensor, "b h t c"],
    k: Float[Tensor, "b h t c"],
    v: Float[Tensor, "b h t c"],
    present: Bool[Tensor, "b t"] | None,
    fused: bool,
) -> Float[Tensor, "b h t c"]:
    """Compute attention to the present tokens (None: all): fused, or as matmul, softmax, matmul (faster on CPUs)."""
    mask = None if present is None else present[:, None, None]
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        weights = weights.masked_fill(~mask, torch.finfo(q.dtype).min)
    return weights.softmax(dim=-1) @ v


def attention_kernel(module: nn.Module, tokens: Float[Tensor, "b t d"], packing: Packing | None = None) -> str:
    """Return the kernel that a timm attention runs on these tokens: triton, cudnn, flash, efficient, math or eager.

    It is found by profiling one call, because torch's choice depends on its release, the device and the shapes.
    `triton` is the project's own kernel, `eager` is matmul, softmax, matmul.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler logs its start and stop
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        module(tokens, attn_mask=packing)
    operators = {event.key for event in profiled.key_averages()}
    if any("short_attention" in operator for operator in operators):
        return "triton"
    for kernel in ("cudnn", "flash", "efficient"):
        if any(f"{kernel}_attention" in operator for operator in operators):
            return kernel
    return "math" if "aten::scaled_dot_product_attention" in operators else "eager"


def to_device(module: nn.Module, device: torch.device, kind: AttentionImpl) -> None:
    """Move a module to a device in channels-last, and set the attention that `kind` (train.attention_impl) means there.

    `auto`: fused attention on a GPU, with the project's own kernels on Hopper; eager attention on a CPU.
    """
    module.to(device)
    module.to(memory_format=torch.channels_last)
    on_gpu = device.type == "cuda"
    hopper = on_gpu and torch.cuda.get_device_capability(device)[0] == 9
    set_attention_impl(
        module,
        fused=kind in ("triton", "sdpa") or (kind == "auto" and on_gpu),
        short=HAS_TRITON and (kind == "triton" or (kind == "auto" and hopper)),
    )


def set_attention_impl(module: nn.Module, fused: bool, short: bool = False) -> None:
    """Set the implementation of every attention layer in `module`, including timm's own.

    fused: use fused (or variable-length) kernels, else matmul, softmax, matmul. short: use the project's own kernels
    for short sequences in this project's layers.
    """
    for part in module.modules():
        if isinstance(part, TimmAttention):
            part.fused_attn = fused
        if isinstance(part, Attention):
            part.short = short

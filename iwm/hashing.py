"""Random numbers by hashing: functions of their place alone, without a generator, the same on every device."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


def hashed_uniform(seed: int, step: int, index: Int64[Tensor, "b"], draws: int) -> Float64[Tensor, "b {draws}"]:
    """Return numbers in [0, 1) that depend on (seed, step, index, position) alone, the same on every device.

    SplitMix64 in counter mode (Steele, Lea and Flood, 2014), in wrapping int64 arithmetic.
    """
    state = _mix(_mix(torch.full_like(index, seed)) + step)
    state = _mix(_mix(state + index)[:, None] + torch.arange(draws, device=index.device))
    return _shift(state, 11).to(torch.float64) * 2.0**-53


def _mix(state: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    state = state - 0x61C8864680B583EB  # the golden-ratio increment 0x9E3779B97F4A7C15, as a signed number
    state = (state ^ _shift(state, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift(state, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return state ^ _shift(state, 31)


def _shift(state: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """Shift right logically; torch's own shift is arithmetic (it extends the sign)."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)

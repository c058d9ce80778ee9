"""Triton for tests of kernels: a GPU's compiler, or the interpreter on a CPU. Import it before any kernel."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which timm does
pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_patch_lang, _create_dot = interpreter._patch_lang, interpreter.InterpreterBuilder.create_dot
_convert_float = interpreter._convert_float


def _loops_over_loaded_bounds(kernel: object) -> object:
    """Work around Triton 3.6, which converts one-element arrays to int, an error since numpy 2.4."""
    scope = _patch_lang(kernel)
    tl.core.tensor.__index__ = lambda self: self.handle.data.item()  # undone with the interpreter's own patches
    return scope


def _products_of_bf16(self: object, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
    """Work around Triton 3.6, which stores bf16 as uint16 and multiplies it as such."""

    def widen(x: TensorHandle) -> TensorHandle:
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    return _create_dot(self, *(widen(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)


def _to_nearest_bf16(data: np.ndarray, kind: Any, target: Any, rounding: Any) -> np.ndarray:
    """Round float32 to the nearest bf16, ties to even, as a GPU does; the interpreter truncates."""
    if kind == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
    return _convert_float(data, kind, target, rounding)


interpreter._patch_lang = _loops_over_loaded_bounds
interpreter._convert_float = _to_nearest_bf16
interpreter.InterpreterBuilder.create_dot = _products_of_bf16


def assert_norm_close(ours: torch.Tensor, exact: torch.Tensor, within: float) -> None:
    """Compare a tensor with a float64 one; within: largest norm of the difference, as a share of the norm."""
    assert (ours.double() - exact).norm() <= within * exact.norm()


class CountedKernel:
    """Kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]

"""Triton for tests of kernels: a GPU's compiler, or the interpreter on a CPU. Import it before any kernel."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which timm does
pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_patch_lang = interpreter._patch_lang


def _loops_over_loaded_bounds(kernel: object) -> object:
    """Work around Triton 3.6, which converts one-element arrays to int, an error since numpy 2.4."""
    scope = _patch_lang(kernel)
    tl.core.tensor.__index__ = lambda self: self.handle.data.item()  # undone with the interpreter's own patches
    return scope


interpreter._patch_lang = _loops_over_loaded_bounds

"""Names of what evaluations and protocols take from a model: which encoder, which token, which norm."""

from __future__ import annotations

from typing import Literal

EncoderName = Literal["teacher", "student"]
"""EMA target encoder (teacher) or trained context encoder (student), as the paper's tables name them."""

ENCODERS: tuple[EncoderName, ...] = ("teacher", "student")

Pool = Literal["mean", "cls", "both"]
"""Input of a linear probe: the mean of the patches, the class token, or the one after the other."""

LayerNormKind = Literal["shared", "last", "own", "none"]
"""Norms of the intermediate layers that a segmentation head receives (iwm/models/heads.py, UPerNet)."""
